"""Graphs that are trained with their tensors rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.lower import trace
from optpipe.patterns import matching
from optpipe.progress import quiet
from optpipe.task import call
from optpipe.training import KEEPS_ZEROS

from .posttraining import calibrate

with quiet("torch.utils._pytree", "torchao"):  # about its own insides
    from torchao.quantization.pt2e import (
        allow_exported_model_train_eval,
        disable_fake_quant,
        disable_observer,
        enable_fake_quant,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from .engines import quantizer_for
    from .integers import make_ready
    from .placement import NORMS, IntegerQuantizer, layers
    from .scheme import scheme

if TYPE_CHECKING:
    from torch import nn

    from .engines import Annotator
    from .qat import Qat

TRAINING = 5  # position of the flag among the arguments of aten.batch_norm


def prepare_training(model: nn.Module, settings: Qat, ctx: Context) -> tuple[GraphModule, Annotator]:
    """`model` as a graph that rounds every tensor that will be quantised, and can be trained.

    Raises StageError if a pattern of `settings.keep` matches no layer, or nothing could run in integers.
    """
    graph = trace(model, ctx.task, training=True).module(check_guards=False)
    kept = matching(layers(graph), settings.keep, "keep", "layer")
    chosen = scheme(
        ctx.target,
        settings.signedness.value,
        settings.placement,
        observer="moving_average",
        per_channel=settings.weights.value == "per_channel",
        training=True,
    )
    quantizer = quantizer_for(settings.placement, ctx, chosen, kept)
    if isinstance(quantizer, IntegerQuantizer):
        make_ready(graph)
    prepared = prepare_qat_pt2e(graph, quantizer)
    if not quantizer.compute_layers:
        raise StageError("this model has no convolution, linear layer or matrix product that could be trained for int8")
    allow_exported_model_train_eval(prepared)
    for name, module in model.named_modules():  # the graph holds the parameters in modules of the same names
        if names := getattr(module, KEEPS_ZEROS, None):
            setattr(prepared.get_submodule(name), KEEPS_ZEROS, names)
    return prepared, quantizer


def calibrate_rounded(prepared: GraphModule, quantizer: Annotator, ctx: Context) -> None:
    """Find the first ranges on calibration data, unrounded; then start to round."""
    prepared.eval()
    prepared.apply(disable_fake_quant)
    calibrate(prepared, quantizer, ctx)
    prepared.apply(enable_fake_quant)
    with ranges_kept(prepared), torch.no_grad():  # scales follow from the ranges when something is first rounded
        call(prepared, ctx.task.example_inputs)


@contextmanager
def ranges_kept(prepared: GraphModule) -> Iterator[None]:
    """Within this the graph rounds, but what it sees does not move its ranges."""
    observing = {name: flag.clone() for name, flag in prepared.named_buffers() if name.endswith("observer_enabled")}
    prepared.apply(disable_observer)
    try:
        yield
    finally:
        for name, flag in prepared.named_buffers():
            if name in observing:
                flag.copy_(observing[name])


def freeze(prepared: GraphModule) -> None:
    """Keep ranges and batch norm's statistics as they are from now on (Krishnamoorthi 2018, §3.2)."""
    prepared.apply(disable_observer)
    for node in prepared.graph.nodes:
        if node.target in NORMS:
            node.update_arg(TRAINING, False)
    prepared.recompile()

"""Post-training quantisation in three steps, which static, mixed and sensitivity analysis share."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.lower import trace
from optpipe.patterns import matching
from optpipe.progress import quiet
from optpipe.task import call, tensors_in

with quiet("torch.utils._pytree", "torchao"):  # about its own insides
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from .engines import quantizer_for
    from .integers import keep_out_of_integers, look_up_integers, make_ready, make_room_for_biases
    from .placement import CLAMPING, MOVING, NORMS, IntegerQuantizer, held, layer_of, layers
    from .scheme import Scheme, scheme

if TYPE_CHECKING:
    from torch import nn

    from .engines import Annotator
    from .static import Static


def scheme_of(settings: Static, ctx: Context) -> Scheme:
    """The types and ranges that `settings` ask for on the target."""
    extra = {"percentile": settings.percentile} if settings.observer.value == "percentile" else {}
    return scheme(
        ctx.target,
        settings.signedness.value,
        settings.placement,
        observer=settings.observer.value,
        observer_settings=extra,
        symmetric=settings.activations.value == "symmetric",
        per_channel=settings.weights.value == "per_channel",
    )


def prepare(
    model: nn.Module, settings: Static, ctx: Context, keep: Iterable[str] = ()
) -> tuple[GraphModule, Annotator]:
    """`model` as a graph with an observer at every tensor that will be quantised; `keep` names more float layers.

    Raises StageError if a pattern of `settings.keep` matches no layer, or nothing could run in integers.
    """
    graph = trace(model, ctx.task).module(check_guards=False)
    kept = {*matching(layers(graph), settings.keep, "keep", "layer"), *keep}
    quantizer = quantizer_for(settings.placement, ctx, scheme_of(settings, ctx), kept)
    if isinstance(quantizer, IntegerQuantizer):
        make_ready(graph)
    prepared = prepare_pt2e(graph, quantizer)
    if not quantizer.compute_layers:
        raise StageError(
            "this model has no convolution, linear layer or matrix product that could run in int8"
            + (f" beside those that keep={settings.keep} leaves in float" if kept else "")
            + "".join(f"; {name} has no int8: {reason}" for name, reason in quantizer.left_in_float.items())
        )
    return prepared, quantizer


def calibrate(prepared: GraphModule, quantizer: Annotator, ctx: Context, limit: int = 0) -> None:
    """Let the observers see at most `limit` batches of calibration data, all of them if it is 0.

    Raises StageError if there is no batch, or a value on the way is NaN or infinite, or always the same: then an
    observer has no range.
    """
    batches = 0
    with torch.no_grad():
        split = ctx.task.calibration if not limit else itertools.islice(ctx.task.calibration, limit)
        for inputs, _ in ctx.progress(split, "calibrating"):
            _look_at(prepared, inputs)
            batches += 1
    if not batches:
        raise StageError("the calibration split is empty; it must hold at least one batch")
    if limit and batches < limit:
        raise StageError(
            f"calibration_batches is {limit}, but the calibration split holds {batches}; lower it, or 0 for all"
        )
    if constant := _constant_activations(prepared, quantizer):
        touched = ", ".join(sorted({layer for layers in constant.values() for layer in layers}))
        raise StageError(
            f"constant on all calibration data: {', '.join(constant)}; it may be dead, or the data too uniform: look "
            f"at both, or leave what touches it in float with keep=[{touched}]"
        )
    if widened := make_room_for_biases(prepared):
        ctx.note(f"{widened} channels with next to no weights got a coarser scale, so that their bias fits in int32")
    chosen = quantizer.scheme
    ctx.record(compute_operators=len(quantizer.compute_layers), calibration_batches=batches, scheme=chosen.name)
    ctx.note(f"{len(quantizer.compute_layers)} operators in int8, {chosen.name}: {chosen.reason}")


def copied(prepared: GraphModule) -> GraphModule:
    """A calibrated graph of its own."""
    with quiet():
        return copy.deepcopy(prepared)


def convert(prepared: GraphModule, quantizer: Annotator, ctx: Context) -> nn.Module:
    """The calibrated graph with quantise operators in place of its observers."""
    converted = convert_pt2e(prepared)
    if isinstance(quantizer, IntegerQuantizer) and quantizer.kernels.rounds_float:
        keep_out_of_integers(converted)
    if tables := look_up_integers(converted):
        ctx.note(f"{tables} embedding tables in int8, a scale for each row")
    for name, reason in quantizer.left_in_float.items():
        ctx.note(f"{name} stays in float: {reason}")
    if quantizer.keep:
        ctx.record(float_layers=sorted(quantizer.keep))
        ctx.note(f"in float: {', '.join(sorted(quantizer.keep))}")
    quantised: nn.Module = converted
    return quantised


def _look_at(prepared: GraphModule, inputs: Any) -> None:
    """Let the observers see a batch; StageError with the first layer that gives NaN or infinity."""
    error = None
    try:
        if all(torch.isfinite(tensor).all() for tensor in tensors_in(call(prepared, inputs))):
            return
    except RuntimeError as raised:  # an observer that makes a histogram
        error = raised
    layer = _first_not_finite(prepared, inputs)
    if layer is None and error is not None:
        raise error
    said = f"'{layer}' gives" if layer else "the model gives"
    raise StageError(f"{said} NaN or infinity on calibration data; look at its weights and at that data") from error


def _first_not_finite(graph: GraphModule, inputs: Any) -> str | None:
    """The layer that first gives NaN or infinity on `inputs`; observers are not asked."""
    found: list[str] = []

    class Look(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            if node.op == "call_module" and hasattr(held(graph, node), "calculate_qparams"):
                return self.env[node.all_input_nodes[0]]
            value = super().run_node(node)
            computed = node.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point()
            if computed and not torch.isfinite(value).all():
                found.append(layer_of(node))
            return value

    arguments = list(inputs.values()) if isinstance(inputs, dict) else inputs
    Look(graph).run(*(arguments if isinstance(arguments, (tuple, list)) else (arguments,)))
    return found[0] if found else None


def _constant_activations(prepared: GraphModule, quantizer: Annotator) -> dict[str, set[str]]:
    """Activations that had one value only throughout calibration, and the layers that give or take each."""
    integer, found = {node.name for node in quantizer.integer_nodes}, {}
    for node in prepared.graph.nodes:
        source = node.args[0] if node.op == "call_module" and "activation_post_process" in str(node.target) else None
        if source is None or source.op == "get_attr":
            continue
        observer = held(prepared, node)
        low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
        if low is not None and high is not None and low.numel() == 1 and float(low) == float(high):
            touching = [_producer(source), *node.users]
            layers = {layer_of(one) for one in touching if one.name in integer}
            found[f"'{layer_of(source)}' ({float(low):g})"] = layers
    return found


def _producer(node: Node) -> Node:
    """The operator whose values `node` gives, clamped, moved, normed or observed on the way."""
    while node.op == "call_module" or node.target in CLAMPING | MOVING | NORMS:
        node = node.all_input_nodes[0]
    return node

"""Quantize, static: weights and activations in int8, scales from calibration data.

Takes and gives a torch module; the one it gives is a graph with quantise operators (PT2E).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn


class Observer(Enum):
    """How the range of an activation is found from calibration data."""

    minmax = "minmax"
    histogram = "histogram"  # the range with the least squared error (Nagel et al. 2021, §3.1)


class Signedness(Enum):
    """Types of activations and weights."""

    auto = "auto"  # what the target's instruction set multiplies fastest
    u8s8 = "u8s8"
    s8s8 = "s8s8"


@register("quantize/static", takes="torch", gives="torch", requires=("torchao",))
@dataclass(kw_only=True)
class Static:
    """Post-training quantisation (Jacob et al. 2018): affine activations, symmetric weights per output channel."""

    observer: Observer = Observer.histogram
    signedness: Signedness = Signedness.auto
    calibration_batches: int = 0  # at most; 0 takes all of the task's calibration split

    def __post_init__(self) -> None:
        if self.calibration_batches < 0:
            raise ValueError(f"calibration_batches is {self.calibration_batches}; it must not be negative")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from optpipe.lower import trace
        from optpipe.progress import quiet

        with quiet("torch.utils._pytree", "torchao"):  # about its own insides
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            from .placement import OnnxRuntimeQuantizer, make_room_for_biases, scheme

        graph = trace(model, ctx.task).module(check_guards=False)
        chosen = scheme(ctx.target, self.signedness.value, self.observer.value)
        quantizer = OnnxRuntimeQuantizer(chosen)
        prepared = prepare_pt2e(graph, quantizer)
        batches = self._calibrate(prepared, ctx)
        if not quantizer.num_compute:
            raise StageError("this model has no convolution, linear layer or matrix product that could run in int8")
        if widened := make_room_for_biases(prepared):
            ctx.note(
                f"{widened} channels with next to no weights got a coarser scale, so that their bias fits in int32"
            )
        ctx.record(compute_operators=quantizer.num_compute, calibration_batches=batches, scheme=chosen.name)
        ctx.note(f"{quantizer.num_compute} operators in int8, {chosen.name}: {chosen.reason}")
        quantised: nn.Module = convert_pt2e(prepared)
        return quantised

    def _calibrate(self, prepared: nn.Module, ctx: Context) -> int:
        """Let the observers see the calibration data; return how many batches there were."""
        import torch

        from optpipe.task import call

        batches = 0
        with torch.no_grad():
            for inputs, _ in ctx.progress(ctx.task.calibration, "calibrating"):
                call(prepared, inputs)
                batches += 1
                if batches == self.calibration_batches:
                    break
        if not batches:
            raise StageError("the calibration split is empty; it must hold at least one batch")
        return batches

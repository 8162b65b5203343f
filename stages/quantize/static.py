"""Quantize, static: weights and activations in int8, scales from calibration data.

Takes and gives a torch module; the one it gives is a graph with quantise operators (PT2E).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

from .engines import Placement, unmet

if TYPE_CHECKING:
    from torch import nn

    from optpipe.target import Target


class Observer(Enum):
    """How the range of an activation is found from calibration data."""

    minmax = "minmax"
    moving_average = "moving_average"  # of the batches' minima and maxima
    histogram = "histogram"  # the range with the least squared error, moving one end at a time
    percentile = "percentile"  # without the values beyond `percentile`
    mse = "mse"  # the share of the whole range with the least squared error (Nagel et al. 2021, §3.1)


class Signedness(Enum):
    """Types of activations and weights."""

    auto = "auto"  # what the target's instruction set multiplies fastest
    u8s8 = "u8s8"
    s8s8 = "s8s8"


class Granularity(Enum):
    """What has a scale of its own."""

    per_channel = "per_channel"
    per_tensor = "per_tensor"


class Symmetry(Enum):
    """Whether the range of an activation must be the same on both sides of zero."""

    affine = "affine"
    symmetric = "symmetric"  # but from zero up behind a relu (Nagel et al. 2021, §2.2.1)


@register("quantize/static", takes="torch", gives="torch", requires=("torchao",))
@dataclass(kw_only=True)
class Static:
    """Post-training quantisation (Jacob et al. 2018): affine activations, symmetric weights per output channel."""

    observer: Observer = Observer.histogram
    percentile: float = 99.99  # of observer=percentile
    weights: Granularity = Granularity.per_channel
    activations: Symmetry = Symmetry.affine
    signedness: Signedness = Signedness.auto
    placement: Placement = Placement.auto  # whose integer operators: the target runtime's, or another engine's
    keep: list[str] = field(default_factory=list)  # layer name patterns that stay float
    calibration_batches: int = 0  # at most; 0 takes all of the task's calibration split
    sensitivity: bool = False  # whether the report shows what each layer costs; takes one validation run for each

    def __post_init__(self) -> None:
        if self.calibration_batches < 0:
            raise ValueError(f"calibration_batches is {self.calibration_batches}; it must not be negative")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}; it must be above 50 and at most 100")

    def problems(self, target: Target) -> list[str]:
        return unmet(self, target)

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from .posttraining import calibrate, convert, copied, prepare
        from .sensitivity import Sensitivity, table

        prepared, quantizer = prepare(model, self, ctx)
        calibrate(prepared, quantizer, ctx, self.calibration_batches)
        if self.sensitivity:
            found = Sensitivity(copied(prepared), quantizer, ctx).analyse(judged=True)
            ctx.table(table(found, ctx.task.metric.unit))
        return convert(prepared, quantizer, ctx)

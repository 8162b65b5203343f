"""Quantize, mixed: int8 wherever the model bears it; the layers that cost most stay float.

Takes and gives a torch module; the one it gives is a graph with quantise operators (PT2E).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

from .static import Static

if TYPE_CHECKING:
    from torch import nn

    from .sensitivity import Sensitivity


@register("quantize/mixed", takes="torch", gives="torch", requires=("torchao",))
@dataclass(kw_only=True)
class Mixed(Static):
    """Post-training quantisation guided by sensitivity (Dong et al. 2019; Nagel et al. 2021, §4.2).

    Layers, embeddings among them, are ranked by the error that each alone brings to the model's output. The fewest of
    the worst that rounding predicts to suffice stay float; more, in growing strides, until quality on validation really
    is within `max_drop` of the model as it came into this step.
    """

    max_drop: float = 0.005  # of quality on validation, in the metric's unit: 0.005 is half a point of accuracy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_drop < 0:
            raise ValueError(f"max_drop is {self.max_drop}; it must not be negative")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import dataclasses

        from .posttraining import calibrate, convert, copied, prepare
        from .sensitivity import Sensitivity, table

        trial = dataclasses.replace(ctx, notes=[], facts={})  # what is said of a trial counts if it is the last
        prepared, quantizer = prepare(model, self, trial)
        calibrate(prepared, quantizer, trial, self.calibration_batches)
        sensitivity = Sensitivity(copied(prepared), quantizer, ctx)
        found = sensitivity.analyse(judged=self.sensitivity)
        ctx.table(table(found, ctx.task.metric.unit))
        ranked = [entry.layer for entry in sorted(found, key=lambda entry: entry.output_sqnr_db)]
        most = max(number for number, layer in enumerate(ranked) if layer in quantizer.compute_layers)
        for count in _growing(self._fewest(sensitivity, ranked), most):
            if count:
                trial = dataclasses.replace(ctx, notes=[], facts={})
                prepared, quantizer = prepare(model, self, trial, keep=ranked[:count])
                calibrate(prepared, quantizer, trial, self.calibration_batches)
            quantised = convert(prepared, quantizer, trial)
            drop = ctx.task.predict(quantised, "validation").drop_from(sensitivity.float)
            if drop <= self.max_drop:
                ctx.notes.extend(trial.notes)
                ctx.record(**trial.facts)
                ctx.record(validation_drop=drop, layers_in_float=count, layers=len(ranked))
                ctx.note(f"{count} of {len(ranked)} layers stay float; {drop:.4f} lost on validation")
                return quantised
        raise StageError(
            f"with {most} of {len(ranked)} layers in float, all that are less robust than '{ranked[most]}', this model "
            f"still loses more than max_drop={self.max_drop:g} on validation; raise max_drop, or train it with "
            "quantize=qat"
        )

    def _fewest(self, sensitivity: Sensitivity, ranked: list[str]) -> int:
        """How many of the worst layers must stay float, by bisection on rounded layers."""
        if sensitivity.drop([]) <= self.max_drop:
            return 0
        low, high = 0, len(ranked)  # too few; enough
        while high - low > 1:
            middle = (low + high) // 2
            if sensitivity.drop(ranked[:middle]) <= self.max_drop:
                high = middle
            else:
                low = middle
        return high


def _growing(first: int, last: int) -> Iterator[int]:
    """`first`, and from there to `last` in strides that double."""
    stride = 1
    while first < last:
        yield first
        first, stride = first + stride, 2 * stride
    yield last

"""Quantize, mixed: int8 wherever the model bears it; the layers that cost most stay float.

Takes and gives a torch module; the one it gives is a graph with quantise operators (PT2E).
"""

from __future__ import annotations

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

    Layers are ranked by the error that each alone brings to the model's output. As few as possible of the worst stay
    float, so that quality on validation is within `max_drop` of the model as it came into this step.
    """

    max_drop: float = 0.005  # of quality on validation, in the metric's unit: 0.005 is half a point of accuracy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_drop < 0:
            raise ValueError(f"max_drop is {self.max_drop}; it must not be negative")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import dataclasses

        from optpipe.measure import quality

        from .posttraining import calibrate, convert, copied, prepare
        from .sensitivity import Sensitivity, table

        trial = dataclasses.replace(ctx, notes=[], facts={})  # what is said of a trial counts if it is the last
        prepared, quantizer = prepare(model, self, trial)
        calibrate(prepared, quantizer, trial, self.calibration_batches)
        sensitivity = Sensitivity(copied(prepared), quantizer, ctx)
        found = sensitivity.analyse()
        ctx.table(table(found, ctx.task.metric.unit))
        ranked = [entry.layer for entry in sorted(found, key=lambda entry: entry.output_sqnr_db)]
        count = self._fewest(sensitivity, ranked)
        while count < len(ranked):
            if count:
                trial = dataclasses.replace(ctx, notes=[], facts={})
                prepared, quantizer = prepare(model, self, trial, keep=ranked[:count])
                calibrate(prepared, quantizer, trial, self.calibration_batches)
            quantised = convert(prepared, quantizer, trial)
            drop = quality.drop(ctx.task.predict(quantised, "validation"), sensitivity.float)
            if drop <= self.max_drop:
                ctx.notes.extend(trial.notes)
                ctx.record(**trial.facts)
                ctx.record(validation_drop=drop, layers_in_float=count, layers=len(ranked))
                ctx.note(f"{count} of {len(ranked)} layers stay float; {drop:.4f} lost on validation")
                return quantised
            count += 1
        raise StageError(
            f"with all layers but the most robust one, '{ranked[-1]}', in float, this model still loses more than "
            f"max_drop={self.max_drop:g} on validation; raise max_drop, or train it with quantize=qat"
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

"""Somebody's own stages: each needs nothing that optpipe's do not."""

from dataclasses import dataclass
from enum import Enum

from optpipe import StageError, Table, register


class Layer(Enum):
    first = "first"
    last = "last"


@register("clip/weights", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Weights:
    """Clip every weight to ±limit, which keeps outliers from spoiling an int8 scale."""

    limit: float = 1.0

    def __post_init__(self):
        if self.limit <= 0:
            raise ValueError(f"limit is {self.limit}; it must be above 0")

    def run(self, model, ctx):
        clipped, largest = 0, []
        for name, parameter in model.named_parameters():
            clipped += int((parameter.abs() > self.limit).sum())
            parameter.data.clamp_(-self.limit, self.limit)
            largest.append([name, float(parameter.detach().abs().max())])
        ctx.record(clipped=clipped)
        columns = ["tensor", "largest weight"]
        ctx.table(Table(title="After clipping", columns=columns, rows=largest, chart=["largest weight"]))
        return model


@register("clip/broken", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Broken:
    """Fails in the way that is asked for."""

    how: str = "raise"
    layer: Layer = Layer.first

    def run(self, model, ctx):
        if self.how == "raise":
            raise KeyError("layer_that_is_not_there")
        if self.how == "refuse":
            raise StageError("this model has no layer to break; give one that has")
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "nan":
            next(model.parameters()).data.fill_(float("nan"))
        return "no model" if self.how == "wrong form" else model


@register("clip/missing", takes="torch", gives="torch", requires=("a_package_nobody_has",), extra="optpipe[nobody]")
@dataclass(kw_only=True)
class Missing:
    """Needs a package that is not installed."""

    def run(self, model, ctx):
        return model

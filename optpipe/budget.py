"""Budget: what the user will not give up, and what happens when a step or the finished run breaks it.

A limit holds when the chance that the true value is inside it is at least `confidence`: with 0.5 the estimate decides,
with 0.95 the bound of a one-sided interval. Where the 95 % interval straddles the limit, the check says "undecided".
Quality is judged on validation samples, never on test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from optpipe.errors import did_you_mean
from optpipe.measure.statistics import one_sided
from optpipe.report import Check, Latency, Measurement, NotMeasured
from optpipe.report.schema import Interval

AT_LEAST = ("speedup", "speedup_same_runtime")  # the other limits are upper ones
OF_THE_BASELINE = {"size_ratio": "size_bytes", "memory_ratio": "peak_memory_bytes"}


class Policy(Enum):
    """What a broken limit does."""

    warn = "warn"  # the run goes on, and says so
    stop = "stop"  # the run ends there, with a non-zero exit code
    rollback = "rollback"  # the step's result is dropped, and the run goes on from the model before it
    relax = "relax"  # the step is tried again with the milder settings listed under `relax`; then as rollback


@dataclass(kw_only=True)
class Limits:
    """What a measured model must keep to; null leaves a limit out. Ratios are of the model as it came in."""

    quality_drop: float | None = None  # at most, as a fraction: 0.01 is one point
    p50_ms: float | None = None  # at most, at batch 1 on the target
    speedup: float | None = None  # at least
    speedup_same_runtime: float | None = None  # at least, against the unoptimised model in the target's runtime
    size_bytes: int | None = None  # at most, of the deployed file
    size_ratio: float | None = None  # at most
    peak_memory_bytes: int | None = None  # at most, of load and inference
    memory_ratio: float | None = None  # at most

    def __post_init__(self) -> None:
        for name, value in self.limits().items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "quality_drop"):
                raise ValueError(f"{name} is {value}; it must be above 0, or null for no limit")

    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        values = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in values.items() if value is not None}


LIMITS = tuple(entry.name for entry in fields(Limits))


@dataclass(kw_only=True)
class Budget(Limits):
    """Limits of the run, and of single steps. The run's limit on quality is judged after every step."""

    policy: Policy = Policy.warn
    confidence: float = 0.5  # that a limit must hold with; 0.95 is careful
    stages: dict[str, Any] = field(default_factory=dict)  # by step: limits, as above, on what it gives

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}; it must be at least 0.5 and below 1")
        if self.policy is not Policy.warn and not (self.limits() or self.stages):
            raise ValueError(f"policy is {self.policy.value}, but there is no limit that could break")
        for key, limits in self.stages.items():
            self.stages[key] = _limits_of_step(f"stages.{key}", limits)

    def of_step(self, key: str) -> dict[str, float]:
        """The limits on what one step gives."""
        limits: dict[str, float] = self.stages[key].limits() if key in self.stages else {}
        return limits


def _limits_of_step(where: str, given: Any) -> Limits:
    if isinstance(given, Limits):
        return given
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; it must name limits, for example {{quality_drop: 0.01}}")
    if not given:
        raise ValueError(f"{where} sets no limit; there are {', '.join(LIMITS)}")
    for name, value in given.items():
        if name not in LIMITS:
            raise ValueError(f"{where} has no limit '{name}'{did_you_mean(str(name), LIMITS)}")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a number")
    return Limits(**given)


@dataclass(frozen=True)
class Estimate:
    """What is known of one figure."""

    value: float
    ci95: Interval
    bound: Callable[[float], float]  # by confidence: the value that the true one is on the right side of
    unit: str = ""  # as it follows the value in a sentence
    scale: float = 1.0  # of the value in that unit

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """Of what has no spread."""
        return cls(value, (value, value), lambda confidence: value)

    @classmethod
    def of_replicas(cls, value: float, each: list[float], *, at_least: bool, unit: str = "") -> Estimate:
        """Of a figure that was measured in several processes; the spread is that of its logarithm over them."""
        logs = [math.log(one) for one in each]
        half, sign = one_sided(logs, 0.975), -1 if at_least else 1
        return cls(
            value,
            (value * math.exp(-half), value * math.exp(half)),
            lambda confidence: value * math.exp(sign * one_sided(logs, confidence)),
            unit,
        )

    def shown(self, value: float) -> str:
        """`value` in the estimate's unit, which is not named."""
        return f"{value:.0f}" if float(value).is_integer() and value > 100 else f"{value * self.scale:.4g}"


def estimates(measurement: Measurement, baseline: Measurement) -> dict[str, Estimate | NotMeasured]:
    """What a measurement says about each limit but that on quality."""
    why = measurement.latency if isinstance(measurement.latency, NotMeasured) else NotMeasured("batch 1 was not timed")
    found: dict[str, Estimate | NotMeasured] = {
        "p50_ms": why,
        "speedup": why,
        "speedup_same_runtime": why,
    }
    if latency := measurement.headline():
        found["p50_ms"] = Estimate.of_replicas(latency.p50_ms, latency.replica_p50_ms, at_least=False, unit=" ms")
        found["speedup"] = Estimate.of_replicas(latency.speedup, latency.replica_speedups, at_least=True)
        found["speedup_same_runtime"] = _same_runtime(latency)
    for name in ("size_bytes", "peak_memory_bytes"):
        value = getattr(measurement, name)
        found[name] = value if isinstance(value, NotMeasured) else Estimate.exact(value)
    for name, figure in OF_THE_BASELINE.items():
        ours, theirs = getattr(measurement, figure), getattr(baseline, figure)
        missing = next((value for value in (ours, theirs) if isinstance(value, NotMeasured)), None)
        found[name] = missing or Estimate.exact(ours / theirs)
    return found


def _same_runtime(latency: Latency) -> Estimate | NotMeasured:
    value = latency.speedup_same_runtime
    if isinstance(value, NotMeasured):
        return value
    return Estimate.of_replicas(value, latency.replica_speedups_same_runtime, at_least=True)


def judge(
    limits: dict[str, float], known: dict[str, Estimate | NotMeasured], confidence: float, where: str
) -> list[Check]:
    """Each of `limits` against what is known. One on a figure that could not be measured does not hold."""
    return [_check(where, name, allowed, known[name], confidence) for name, allowed in limits.items()]


def _check(where: str, name: str, allowed: float, estimate: Estimate | NotMeasured, confidence: float) -> Check:
    facts: dict[str, Any] = {"where": where, "limit": name, "allowed": allowed}
    if isinstance(estimate, NotMeasured):
        said = f"{name} was not measured ({estimate.not_measured}), so its limit cannot be shown to hold"
        return Check(**facts, value=estimate, bound=estimate, holds=False, undecided=True, said=said)
    bound = estimate.bound(confidence)
    holds = bound >= allowed if name in AT_LEAST else bound <= allowed
    low, high = estimate.ci95
    undecided = low < allowed < high
    side = "within" if holds else "below" if name in AT_LEAST else "above"
    said = f"{name} is {estimate.shown(estimate.value)}{estimate.unit}, {side} the limit of {estimate.shown(allowed)}"
    if low < high:
        said += f"; 95 % interval {estimate.shown(low)} to {estimate.shown(high)}"
    if confidence > 0.5 and bound != estimate.value:
        said += f", with confidence {confidence:g} at {'least' if name in AT_LEAST else 'most'} {estimate.shown(bound)}"
    if undecided:
        said += ": undecided, it straddles the limit"
    return Check(**facts, value=estimate.value, bound=bound, holds=holds, undecided=undecided, said=said)

"""What a search judges a finished run by. Less is better in everything; nothing here reads the test split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from optpipe.budget import AT_LEAST
from optpipe.report.schema import Check, Final, Measurement, NotMeasured, Report

GOAL = "goal"  # by how much the limits are missed, all together
UNKNOWN = 10.0  # the miss of a limit whose figure was not measured
POINT = 0.01


def quality(final: Final, baseline: Measurement) -> float | NotMeasured:
    """What was lost on validation samples, in the metric's unit: 0.01 is a point."""
    return final.quality_drop


def latency(final: Final, baseline: Measurement) -> float | NotMeasured:
    """Time of a call at batch 1 / that of the model as it came in, both in the same rounds."""
    found = final.measurement.headline()
    if found is not None:
        return 1 / found.speedup
    entries = final.measurement.latency
    return entries if isinstance(entries, NotMeasured) else NotMeasured("batch 1 was not timed")


def _ratio(name: str) -> Callable[[Final, Measurement], float | NotMeasured]:
    def objective(final: Final, baseline: Measurement) -> float | NotMeasured:
        ours, theirs = getattr(final.measurement, name), getattr(baseline, name)
        missing = next((value for value in (ours, theirs) if isinstance(value, NotMeasured)), None)
        return missing or cast(float, ours / theirs)

    return objective


OBJECTIVES: dict[str, Callable[[Final, Measurement], float | NotMeasured]] = {
    "quality": quality,
    "latency": latency,
    "size": _ratio("size_bytes"),  # ratios to the model as it came in
    "memory": _ratio("peak_memory_bytes"),
    "energy": _ratio("energy_joules"),
}


def figures(report: Report, names: list[str]) -> dict[str, float] | NotMeasured:
    """Those of `names`, or why one is missing."""
    if isinstance(report.final, NotMeasured):
        return report.final
    if isinstance(report.baseline, NotMeasured):
        return report.baseline
    found: dict[str, float] = {}
    for name in names:
        value = miss(report) if name == GOAL else OBJECTIVES[name](report.final, report.baseline)
        if isinstance(value, NotMeasured):
            return NotMeasured(f"{name} was not measured: {value.not_measured}")
        found[name] = value
    return found


def constraints(report: Report) -> dict[str, float]:
    """For each limit of the run's budget by how much it is missed, at most 0 where it holds.

    Quality in points, the others as the logarithm of a ratio, so that they can be added. Of a run that ended early a
    limit that was not judged yet counts as kept.
    """
    judged: dict[str, Check] = {}
    for check in report.budget.checks:
        if check.limit in report.budget.limits and (check.where == "run" or not check.holds):
            judged[check.limit] = check
    return {name: _missed(judged[name]) if name in judged else 0.0 for name in report.budget.limits}


def miss(report: Report) -> float:
    """By how much the limits are missed, all together; 0 if they hold."""
    return sum(max(0.0, missed) for missed in constraints(report).values())


def _missed(check: Check) -> float:
    """Above 0 where the limit does not hold with the budget's confidence, else 0 or below."""
    if isinstance(check.bound, NotMeasured):
        return UNKNOWN
    if check.limit == "quality_drop":
        return (check.bound - check.allowed) / POINT
    ratio = math.log(check.bound / check.allowed)
    return -ratio if check.limit in AT_LEAST else ratio

"""Two independent runs against one another: what differs in how they were measured, then in what came out.

The units of the latency tests are replicas, fresh processes: calls within one are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from optpipe.fingerprint import differences
from optpipe.measure.effect import welch
from optpipe.measure.intervals import delta_interval
from optpipe.report import figures, samples
from optpipe.report.runs import Run
from optpipe.report.samples import Floats
from optpipe.report.schema import Interval, Measurement, NotMeasured, Quality


@dataclass(frozen=True, kw_only=True)
class Test:
    """B against A: a ratio (above 1: B is faster), or a difference (above 0: B has more)."""

    value: float
    ci95: Interval
    n: tuple[int, int]
    p: float | NotMeasured
    cohens_d: float | NotMeasured  # of the logarithms, for a ratio


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Run B against run A."""

    machines: list[str]  # where they differ, latency cannot be compared
    builds: list[str]
    baselines: list[str]
    speedups: Test | NotMeasured
    times: Test | NotMeasured
    quality: Test | NotMeasured
    paired: bool  # whether the quality is compared sample by sample


def compare(a: Run, b: Run) -> Comparison:
    """B against A."""
    machines = machine_differences(a, b)
    builds = [said for said in differences(a.report.environment, b.report.environment) if said not in machines]
    paired, quality = _quality(a, b)
    reason = _why_not(a, b, machines)
    return Comparison(
        machines=machines,
        builds=builds,
        baselines=list(_baseline_differences(a, b)),
        speedups=NotMeasured(reason) if reason else _ratio(*_logs(a, b, "eager")),
        times=NotMeasured(reason) if reason else _ratio(*_logs(a, b)),
        quality=quality,
        paired=paired,
    )


def machine_differences(a: Run, b: Run) -> list[str]:
    """The differences between two machines, those between their builds apart."""
    versions = a.report.environment.get("versions", {})
    return differences(a.report.environment, {**b.report.environment, "versions": versions})


def _baseline_differences(a: Run, b: Run) -> Iterator[str]:
    """Signs that the two runs did not start from the same model and data."""
    before, after = a.report.baseline, b.report.baseline
    if not (isinstance(before, Measurement) and isinstance(after, Measurement)):
        return
    if before.size_bytes != after.size_bytes:
        yield " / ".join(figures.words(found.size_bytes, figures.size) for found in (before, after))
    if isinstance(before.quality, Quality) and isinstance(after.quality, Quality):
        if (before.quality.metric, before.quality.value) != (after.quality.metric, after.quality.value):
            yield " / ".join(f"{q.metric} {figures.quality_value(q)}" for q in (before.quality, after.quality))
    if a.report.data_fingerprint != b.report.data_fingerprint:
        yield f"data '{a.report.data_fingerprint}' / '{b.report.data_fingerprint}'"


def _why_not(a: Run, b: Run, machines: list[str]) -> str:
    """Why latencies cannot be compared, or an empty string."""
    if machines:
        return f"measured on different machines: {'; '.join(machines)}; latency of the two cannot be compared"
    for name, run in (("A", a), ("B", b)):
        if isinstance(run.latency, NotMeasured):
            return f"{name} has no latency: {run.latency.not_measured}"
    ways = [(run.latency.batch_size, run.latency.threads) for run in (a, b) if not isinstance(run.latency, NotMeasured)]
    if ways[0] != ways[1]:
        said = " / ".join(f"batch {batch}, {threads} thread(s)" for batch, threads in ways)
        return f"timed in different ways: {said}"
    return ""


def _logs(a: Run, b: Run, reference: str = "") -> tuple[Floats | NotMeasured, Floats | NotMeasured]:
    """Of A and of B, per replica: minus the logarithm of the time, or the logarithm of reference / time."""
    found: list[Floats | NotMeasured] = []
    for name, run in (("A", a), ("B", b)):
        assert not isinstance(run.latency, NotMeasured)
        logs = samples.replica_logs(run.folder, run.latency)
        if "subject" not in logs or (reference and reference not in logs):
            found.append(NotMeasured(f"{name}'s folder does not hold the times of its calls"))
        else:
            found.append((logs[reference] if reference else 0.0) - logs["subject"])
    return found[0], found[1]


def _ratio(a: Floats | NotMeasured, b: Floats | NotMeasured) -> Test | NotMeasured:
    """exp(mean(b) - mean(a)) with Welch's interval."""
    test = _welch(a, b)
    if isinstance(test, NotMeasured):
        return test
    low, high = (math.exp(end) for end in test.ci95)
    return Test(value=math.exp(test.value), ci95=(low, high), n=test.n, p=test.p, cohens_d=test.cohens_d)


def _welch(a: Floats | NotMeasured, b: Floats | NotMeasured) -> Test | NotMeasured:
    if isinstance(a, NotMeasured):
        return a
    if isinstance(b, NotMeasured):
        return b
    try:
        found = welch(b, a)
    except ValueError as error:
        return NotMeasured(str(error))
    return Test(value=found.difference, ci95=found.ci95, n=(len(a), len(b)), p=found.p, cohens_d=found.cohens_d)


def _quality(a: Run, b: Run) -> tuple[bool, Test | NotMeasured]:
    """The difference in quality on the test split: paired where both scored the same samples, else Welch's."""
    found = []
    for name, run in (("A", a), ("B", b)):
        arrays = samples.arrays(run.folder / "quality" / "final.npz")
        scores = arrays.get("scores")
        if scores is None and arrays:
            return False, NotMeasured(
                "the metric is of the whole split, so there is no score of each sample to compare"
            )
        if scores is None:
            return False, NotMeasured(f"{name}'s folder has no quality/final.npz with the score of every sample")
        found.append(np.asarray(scores, float))
    metrics = [_metric(run) for run in (a, b)]
    if metrics[0] != metrics[1]:
        return False, NotMeasured(f"the metrics differ: {' / '.join(name for name, _ in metrics)}")
    before, after = found
    fingerprint = a.report.data_fingerprint
    if fingerprint and fingerprint == b.report.data_fingerprint and len(before) == len(after):
        test = _welch(before, after)
        effect: float | NotMeasured = test if isinstance(test, NotMeasured) else test.cohens_d
        p = NotMeasured("the interval is paired")
        interval = delta_interval(after, before, fraction=metrics[0][1] == "fraction")
        value, n = float((after - before).mean()), (len(before), len(after))
        return True, Test(value=value, ci95=interval, n=n, p=p, cohens_d=effect)
    return False, _welch(before, after)


def _metric(run: Run) -> tuple[str, str]:
    """Name and unit."""
    quality = run.final.quality if isinstance(run.final, Measurement) else None
    return (quality.metric, quality.unit) if isinstance(quality, Quality) else ("none", "value")

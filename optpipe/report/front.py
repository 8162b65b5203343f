"""The Pareto front of several runs: those that no other run is better than in quality, latency and size at once.

Better is what can be told: quality and speed-up whose 95 % intervals do not overlap, sizes that differ at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optpipe.report import figures
from optpipe.report.runs import Run
from optpipe.report.schema import Interval, Measurement, NotMeasured
from optpipe.search import weighed
from optpipe.search.objectives import figures as figures_of


@dataclass(frozen=True)
class Point:
    """A run whose three figures are known; of each more is better."""

    run: Run
    quality: tuple[float, Interval]  # the difference to the model as it came in, whichever way the metric points
    speed: tuple[float, Interval]  # times faster than the model as it came in
    size: float  # minus bytes

    def order(self, other: Point) -> tuple[int, int, int]:
        """1, 0 or -1 for each objective: better than, not told apart from, or worse than `other`."""
        sizes = (self.size > other.size) - (self.size < other.size)
        return _told(self.quality[1], other.quality[1]), _told(self.speed[1], other.speed[1]), sizes

    def beats(self, other: Point) -> bool:
        """At least as good in everything, and better in something."""
        return min(order := self.order(other)) >= 0 and max(order) > 0


def point(run: Run) -> Point | None:
    """None where a figure was not measured."""
    final, latency = run.final, run.latency
    if not isinstance(final, Measurement) or isinstance(latency, NotMeasured):
        return None
    if isinstance(final.quality, NotMeasured) or isinstance(final.size_bytes, NotMeasured):
        return None
    sign = 1 if final.quality.higher_is_better else -1
    low, high = sorted(sign * end for end in final.quality.delta_ci95)
    return Point(
        run, (sign * final.quality.delta, (low, high)), (latency.speedup, latency.speedup_ci95), -final.size_bytes
    )


def front(runs: Sequence[Run]) -> list[list[Point]]:
    """The runs that none beats, fastest first; those that cannot be told apart in anything are together."""
    points = [found for run in runs if (found := point(run))]
    best = [one for one in points if not any(other.beats(one) for other in points)]
    groups: list[list[Point]] = []
    for one in sorted(best, key=lambda found: -found.speed[0]):
        same = next((group for group in groups if not any(one.order(group[0]))), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return groups


def best(runs: Sequence[Run]) -> Run | None:
    """Of the runs that kept their budget the fastest; of those not told apart from it the smallest."""
    points = [found for run in runs if run.report.status == "ok" and (found := point(run))]
    if not points:
        return None
    fastest = max(points, key=lambda found: found.speed[0])
    alike = [found for found in points if found.order(fastest)[1] == 0]
    return max(alike, key=lambda found: (found.size, found.quality[0])).run


def said(runs: Sequence[Run]) -> list[str]:
    """The front in words, the best run inside its budget, and the command that repeats it."""
    lines = [f"on the Pareto front: {' = '.join(_said(found) for found in group)}" for group in front(runs)]
    if chosen := best(runs):
        limits = chosen.report.budget.limits
        inside = "inside its budget" if limits else "without a budget"
        lines += [f"the fastest {inside}: {chosen.name}", f"  {chosen.report.command}"]
    return lines


def ranked(runs: Sequence[Run], weights: Mapping[str, float]) -> list[str]:
    """The runs by Σ weight · objective, least first, in words; why a run is not among them."""
    if not weights:
        return []
    sums, missing = [], []
    for run in runs:
        found = figures_of(run.report, list(weights))
        if isinstance(found, NotMeasured):
            missing.append(f"  {run.name}: {found.not_measured}")
        else:
            sums.append((weighed(weights, found), run.name))
    spoken = " + ".join(f"{weight:g}·{name}" for name, weight in weights.items())
    return [f"by {spoken}, less is better:", *(f"  {name}: {value:.4g}" for value, name in sorted(sums)), *missing]


def _said(found: Point) -> str:
    final = found.run.final
    assert isinstance(final, Measurement) and not isinstance(final.quality, NotMeasured)
    assert not isinstance(final.size_bytes, NotMeasured)
    quality = figures.quality_delta(final.quality)
    return f"{found.run.name} ({figures.times(found.speed[0])}, {figures.size(final.size_bytes)}, {quality})"


def _told(ours: Interval, theirs: Interval) -> int:
    return (ours[0] > theirs[1]) - (ours[1] < theirs[0])

"""Which of several models is the best, and whether it is better than the one that all of them were made from.

Two are told apart in speed where their intervals against one and the same baseline do not overlap, and the figures lie
further apart than the margin of equivalence; in size, by more than that margin.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from optpipe.budget import Estimate
from optpipe.metrics import Metric
from optpipe.report import Measurement, NotMeasured, Verdict, figures
from optpipe.report.schema import Interval


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One model, measured by the same rules as the others."""

    measurement: Measurement
    metric: Metric
    drop: Estimate  # of quality on validation, against the run's baseline
    broken: dict[str, str] = field(default_factory=dict)  # limits of the budget: what is said of each

    @property
    def runtime(self) -> str:
        """The engine that it was timed in; empty where it was not."""
        latency = self.measurement.headline()
        return latency.runtime if latency else ""

    @property
    def speed(self) -> tuple[float, Interval] | None:
        """Times faster than the unoptimised baseline in the same runtime; than it came in, where it has none there."""
        latency = self.measurement.headline()
        if latency is None:
            return None
        same, ci95 = latency.speedup_same_runtime, latency.speedup_same_runtime_ci95
        if isinstance(same, NotMeasured) or isinstance(ci95, NotMeasured):
            return self.whole_speed
        return same, ci95

    @property
    def whole_speed(self) -> tuple[float, Interval] | None:
        """Times faster than the baseline as it came in, which compares across engines."""
        latency = self.measurement.headline()
        return (latency.speedup, latency.speedup_ci95) if latency else None

    @property
    def mean_speed(self) -> float:
        """Times faster than the baseline as it came in, the geometric mean over the batch sizes that were timed."""
        latency = self.measurement.latency
        speeds = [] if isinstance(latency, NotMeasured) else [entry.speedup for entry in latency]
        return statistics.geometric_mean(speeds) if speeds else 0.0

    @property
    def size(self) -> float:
        """In bytes; unknown is infinite, since a known size is better."""
        size = self.measurement.size_bytes
        return float("inf") if isinstance(size, NotMeasured) else size

    def said(self) -> str:
        """Its figures: time, speed, size, and the change of quality."""
        latency, speed, size = self.measurement.headline(), self.speed, self.measurement.size_bytes
        parts = []
        if latency and speed:
            same = "" if isinstance(latency.speedup_same_runtime, NotMeasured) else " in the same runtime"
            ratio = f"{figures.times(speed[0])} {figures.interval(speed[1])}{same}"
            parts += [figures.milliseconds(latency.p50_ms), ratio]
        else:
            parts.append("latency not measured")
        parts.append("size not measured" if isinstance(size, NotMeasured) else figures.size(size))
        return ", ".join([*parts, self._change()])

    def _change(self) -> str:
        """Of the metric itself, from that of the model as it came in."""
        fraction = self.metric.unit == "fraction"
        ends = (self.drop.value, *self.drop.ci95)
        change, low, high = (-end for end in ends) if self.metric.higher_is_better else ends
        if fraction:
            shown = [figures.signed(100 * value, 2) for value in (change, *sorted((low, high)))]
        else:
            shown = [f"{value:+.3g}".replace("-", figures.MINUS) for value in (change, *sorted((low, high)))]
        return f"{shown[0]} {'points' if fraction else self.metric.name} [{shown[1]}, {shown[2]}] on validation"


def speed_of(one: Entrant, other: Entrant, margin: float) -> Verdict | None:
    """Of `one` against `other`; None where they were not both timed."""
    same_engine = one.runtime == other.runtime
    ours, theirs = (one.speed, other.speed) if same_engine else (one.whole_speed, other.whole_speed)
    if ours is None or theirs is None:
        return None
    (value, (low, high)), (reference, (least, most)) = ours, theirs
    if low > most and value > reference * (1 + margin):
        return "faster"
    return "slower" if high < least and value * (1 + margin) < reference else "same"


def shortcoming(one: Entrant, before: Entrant, margin: float, gains_quality: Callable[[], bool]) -> str:
    """Why `one` is no better than the model `before` it; empty if it is.

    Better is: it holds a limit that the other breaks; faster; smaller, or of higher quality, and not slower.
    gains_quality: whether its quality is higher beyond doubt, asked only where the rest does not decide.
    """
    if one.broken.keys() - before.broken.keys():
        return "it breaks a limit that the model before it holds"
    if before.broken.keys() - one.broken.keys():
        return ""
    speed, smaller = speed_of(one, before, margin), one.size * (1 + margin) < before.size
    if speed == "faster" or (speed != "slower" and (smaller or gains_quality())):
        return ""
    compared = {"slower": "slower than", "same": "no faster than", None: "not timed beside"}[speed]
    return f"{compared} the model before it, and {'smaller' if smaller else 'no smaller'}"


def best(entrants: Sequence[Entrant], margin: float) -> Entrant:
    """Of the leaders the smallest file; of files of one size the one that lost least quality, then the first."""
    return min(leaders(entrants, margin), key=lambda one: (one.size, one.drop.value))


def best_engine(entrants: Sequence[Entrant], margin: float) -> Entrant:
    """Of the leaders, which run one file, the fastest over all batch sizes; then the one that lost least quality."""
    found = leaders(entrants, margin)
    enough = max(one.mean_speed for one in found) / (1 + margin)
    return min((one for one in found if one.mean_speed >= enough), key=lambda one: one.drop.value)


def leaders(entrants: Sequence[Entrant], margin: float) -> list[Entrant]:
    """Those inside the budget that are not told apart from the fastest of them at batch 1.

    Where all break the limit on quality, the one that lost least, as what they began with did.
    """
    found = [one for one in entrants if not one.broken] or list(entrants)
    if all("quality_drop" in one.broken for one in found):
        return [min(found, key=lambda one: one.drop.value)]
    timed = [one for one in found if one.speed]
    if not timed:
        return found
    in_one_engine = len({one.runtime for one in timed}) == 1
    fastest = max(timed, key=lambda one: ((one.speed if in_one_engine else one.whole_speed) or (0.0,))[0])
    return [one for one in timed if speed_of(one, fastest, margin) == "same"]

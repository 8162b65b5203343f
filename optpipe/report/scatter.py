"""The runs of a sweep as a picture: how much faster, at what cost in quality, how large, and which nothing beats.

Up is better and right is faster, whichever way the metric points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from optpipe.report import figures
from optpipe.report.charts import WIDE
from optpipe.report.front import Point, best, front, point
from optpipe.report.runs import Run
from optpipe.report.schema import Measurement, Quality
from optpipe.report.svg import Scale, drawing, line, path, tag, text

LEFT, TOP, BOTTOM = 46.0, 8.0, 300.0  # of the area with the runs
BELOW = BOTTOM - 6  # of a mark that lies beyond the lower edge
LARGEST, SMALLEST = 10.0, 2.5  # radius of a mark
WIDE_RANGE = 4.0  # times; from there on the scale is logarithmic
BOLD, TALL = 7.0, 13.0  # a character of a label

Box = tuple[float, float, float, float]  # left, top, right, bottom


def drawn(runs: Sequence[Run]) -> Markup | None:
    """None where fewer than two can be compared: all three figures are known, and quality is of one metric."""
    points = [found for run in runs if (found := point(run))]
    metrics = {(one.metric, one.unit, one.higher_is_better) for one in map(_quality, points)}
    if len(points) < 2 or len(metrics) != 1:
        return None
    return Scatter(points, front(runs), best(runs)).drawn()


class Scatter:
    """At least two runs, those on the front in groups that cannot be told apart, and the one that was chosen."""

    def __init__(self, points: Sequence[Point], groups: Sequence[Sequence[Point]], chosen: Run | None) -> None:
        self.points, self.groups = points, groups
        self.best = [found.run.name for group in groups for found in group]
        self.chosen = chosen.name if chosen else ""
        self.quality = _quality(points[0])
        self.limits = _limits(points)
        self.x, self.y = self._speeds(), self._qualities()
        self.taken: list[Box] = []  # by text and marks

    def drawn(self) -> Markup:
        parts = [*self._axes(), *self._budget()]
        parts += [path(sorted(map(self._at, group)), "alike") for group in self.groups if len(group) > 1]
        order = sorted(self.points, key=lambda one: (self._is_named(one), one.size))  # small ones in front
        parts += [mark for one in order for mark in (*self._cross(one), self._mark(one))]
        title = "The runs: times faster, and difference in quality from the model as it came in"
        return drawing("front", title, WIDE, BOTTOM + 38, *parts, *self._labels())

    def _speeds(self) -> Scale:
        ends = [end for one in self.points for end in _near(one.speed[0], one.speed[1])]
        ends += [self.limits["speedup"]] if "speedup" in self.limits else []
        low, high = min(ends), max(ends)
        if high / low >= WIDE_RANGE:
            return Scale(low / 1.15, high * 1.15, LEFT, WIDE - 8, log=True)
        room = 0.08 * (high - low) or 0.1 * high
        return Scale(max(0.0, low - room), high + room, LEFT, WIDE - 8)

    def _qualities(self) -> Scale:
        """Around those with a name, inside their budget if there are any: a run that lost it all would hide them."""
        named = list(filter(self._is_named, self.points))
        kept = [one for one in named if one.run.report.status == "ok"] or named
        ends = [0.0, *(end for one in kept for end in (one.quality[0], *one.quality[1]) if math.isfinite(end))]
        ends += [-self.limits["quality_drop"]] if "quality_drop" in self.limits else []
        reach = max(ends) - min(ends) or 0.01
        others = [end for one in self.points for end in (one.quality[0], *one.quality[1])]
        ends += [end for end in others if min(ends) - reach <= end <= max(ends) + reach]
        room = 0.06 * (max(ends) - min(ends)) or 0.01
        return Scale(min(ends) - room, max(ends) + room, BOTTOM, TOP)

    def _change(self, value: float) -> str:
        """A place on the axis in the metric's own direction."""
        return figures.quality_change(self.quality, value if self.quality.higher_is_better else -value)

    def _at(self, one: Point) -> tuple[float, float]:
        return self.x(one.speed[0]), BELOW if self._is_below(one) else self.y(one.quality[0])

    def _axes(self) -> Iterator[Markup]:
        for tick in self.x.ticks():
            yield line(self.x(tick), TOP, self.x(tick), BOTTOM, "grid")
            yield text(self.x(tick), BOTTOM + 14, figures.short(tick), class_="small", anchor="middle")
        for tick in self.y.ticks(6):
            yield line(LEFT, self.y(tick), WIDE - 8, self.y(tick), "grid" if tick else "zero")
            yield text(LEFT - 6, self.y(tick) + 4, self._change(tick), class_="small", anchor="end")
        if self.x.low < 1 < self.x.high:
            yield line(self.x(1), TOP, self.x(1), BOTTOM, "zero")
        scale = "times faster, logarithmic scale →" if self.x.log else "times faster →"
        yield text(WIDE - 8, BOTTOM + 32, scale, class_="small", anchor="end")
        better = "" if self.quality.higher_is_better else ", less is better"
        yield text(0, BOTTOM + 32, f"↑ {figures.quality_unit(self.quality)}{better}", class_="small")

    def _budget(self) -> Iterator[Markup]:
        if "quality_drop" in self.limits:
            y = self.y(-self.limits["quality_drop"])
            yield line(LEFT, y, WIDE - 8, y, "limit")
            yield self._limit(LEFT + 4, y - 4)
        if "speedup" in self.limits:
            x = self.x(self.limits["speedup"])
            yield line(x, TOP, x, BOTTOM, "limit")
            yield self._limit(x + 4, TOP + 10)

    def _limit(self, x: float, y: float) -> Markup:
        self.taken.append((x, y - TALL, x + BOLD * len("budget"), y))
        return text(x, y, "budget", class_="small limit")

    def _cross(self, one: Point) -> Iterator[Markup]:
        """Its 95 % intervals."""
        if self._is_below(one):
            return
        x, y = self._at(one)
        class_ = "cross best" if one.run.name in self.best else "cross"
        yield line(self.x(one.speed[1][0]), y, self.x(one.speed[1][1]), y, class_)
        yield line(x, self.y(one.quality[1][0]), x, self.y(one.quality[1][1]), class_)

    def _mark(self, one: Point) -> Markup:
        (x, y), words = self._at(one), ["mark"]
        words += ["best"] if one.run.name in self.best else []
        words += ["over"] if one.run.report.status != "ok" else []
        words += ["chosen"] if one.run.name == self.chosen else []
        if self._is_below(one):
            corners = [(x, y + 4), (x - 5, y - 4), (x + 5, y - 4), (x, y + 4)]
            return tag("g", tag("title", self._said(one)), path(corners, " ".join(words)))
        return tag("circle", tag("title", self._said(one)), cx=x, cy=y, r=self._radius(one), class_=" ".join(words))

    def _is_named(self, one: Point) -> bool:
        return one.run.name in (*self.best, self.chosen)

    def _is_below(self, one: Point) -> bool:
        return one.quality[0] < self.y.low

    def _radius(self, one: Point) -> float:
        """The area is the file's size."""
        return max(SMALLEST, LARGEST * math.sqrt(one.size / min(other.size for other in self.points)))

    def _said(self, one: Point) -> str:
        settings = " ".join(f"{key}={value}" for key, value in one.run.settings.items())
        told = f"{figures.times(one.speed[0])}, {figures.size(-one.size)}, {figures.quality_delta(_quality(one))}"
        return f"{one.run.name}: {told}\n{settings}"

    def _labels(self) -> Iterator[Markup]:
        """Names, each beside its mark where it hides no other, as far as there is such a place."""
        self.taken += [_around(self._at(one), self._radius(one)) for one in self.points]
        for one in filter(self._is_named, self.points):
            (x, y), away = self._at(one), self._radius(one) * 0.7 + 3
            width = BOLD * len(one.run.name)
            places = [(x + dx, y + dy) for dx in (away, -away - width) for dy in (-away, away + TALL - 3)]
            boxes = [(left, low - TALL + 2, left + width, low + 2) for left, low in places]
            box = min(boxes, key=lambda box: sum(_overlap(box, other) for other in self.taken) + _outside(box))
            self.taken.append(box)
            yield text(box[0], box[3] - 2, one.run.name, class_="label")


def _quality(one: Point) -> Quality:
    final = one.run.final
    assert isinstance(final, Measurement) and isinstance(final.quality, Quality)
    return final.quality


def _limits(points: Sequence[Point]) -> dict[str, float]:
    """Those that all runs were given."""
    first, *others = [one.run.report.budget.limits for one in points]
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _near(value: float, interval: tuple[float, float]) -> tuple[float, float, float]:
    """A value and the ends of its interval, as far as they are of its size: one may have no end."""
    return value, max(interval[0], value / 2), min(interval[1], value * 2)


def _around(centre: tuple[float, float], radius: float) -> Box:
    return centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Box) -> float:
    """The area of a box that the drawing has no room for."""
    inside = _overlap(box, (LEFT, TOP, WIDE, BOTTOM))
    return 10 * ((box[2] - box[0]) * (box[3] - box[1]) - inside)

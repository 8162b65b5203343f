"""The report's pictures, as SVG that follows the page's colours, readable on paper and without colour.

Widths are those of a phone's screen, so that text keeps its size there; on a wide one charts stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from optpipe.report import figures
from optpipe.report.schema import Interval, Latency, NotMeasured, Roofline, Sustained
from optpipe.report.svg import LETTER, Scale, drawing, line, path, rect, tag, text

Floats = NDArray[np.float64]
NARROW, WIDE = 340.0, 420.0
ROW = 38.0
BOLD = 7.4  # width of an average bold character
BINS = 70


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model in a chart over the steps."""

    label: str
    said: str  # the figure in words
    value: float | NotMeasured
    ci95: Interval | None = None
    chained: bool = True  # whether the next step started from it


def waterfall(name: str, title: str, rows: Sequence[Row]) -> Markup:
    """Bars from zero; hatched is what a step took away from the model before it."""
    known = [row for row in rows if not isinstance(row.value, NotMeasured)]
    ends = [v for row in known for v in (row.value, *(row.ci95 or ())) if isinstance(v, float | int)]
    scale = Scale(0.0, max((end for end in ends if math.isfinite(end)), default=1.0) or 1.0, 1.0, NARROW - 1)
    parts, before = [], 0.0
    for i, row in enumerate(rows):
        y = i * ROW
        parts.append(_said(row, y))
        if isinstance(row.value, NotMeasured):
            continue
        end = scale(row.value)
        if scale(before) > end + 1:
            parts.append(rect(end, y + 20, scale(before) - end, 10, "gone"))
        parts.append(rect(scale(0), y + 20, end - scale(0), 10, "kept"))
        if row.ci95:
            parts += _whisker(scale, row.ci95, y + 25)
        before = row.value if row.chained else before
    return drawing(name, title, NARROW, len(rows) * ROW, *parts)


def dots(name: str, title: str, rows: Sequence[Row], form: Callable[[float], str]) -> Markup:
    """Differences from the baseline with intervals. The scale is that of the last row: others may lie beyond it."""
    scale = _around_zero(rows)
    height = len(rows) * ROW
    parts = [line(scale(0), 14, scale(0), height, "zero")]
    for i, row in enumerate(rows):
        y = i * ROW
        parts.append(_said(row, y))
        if isinstance(row.value, NotMeasured):
            continue
        if not scale.low <= row.value <= scale.high:
            x, way = (scale.start, 1) if row.value < scale.low else (scale.end, -1)
            parts.append(path([(x, y + 25), (x + 8 * way, y + 20), (x + 8 * way, y + 30), (x, y + 25)], "beyond"))
            parts.append(
                text(x + 12 * way, y + 29, "beyond the scale", class_="small", anchor="start" if way > 0 else "end")
            )
            continue
        if row.ci95:
            parts += _whisker(scale, row.ci95, y + 25)
        parts.append(tag("circle", cx=scale(row.value), cy=y + 25, r=4, class_="dot"))
    for value, anchor in ((scale.low, "start"), (0.0, "middle"), (scale.high, "end")):
        parts.append(text(scale(value), height + 12, form(value), class_="small", anchor=anchor))
    return drawing(name, title, NARROW, height + 16, *parts)


def _around_zero(rows: Sequence[Row]) -> Scale:
    """Wide enough for the last row that was measured, and for its interval, with room beside them."""
    last = next((row for row in reversed(rows) if not isinstance(row.value, NotMeasured) and row.chained), None)
    ends = [v for v in (last.value, *(last.ci95 or ())) if isinstance(v, float | int)] if last else []
    finite = [abs(end) for end in ends if math.isfinite(end)]
    reach = 1.6 * max(finite, default=0.0) or 0.01
    return Scale(-reach, reach, 4.0, NARROW - 4)


def _said(row: Row, y: float) -> Markup:
    room = max(NARROW - 12 - BOLD * len(row.said), NARROW * 0.36)
    figure = text(NARROW, y + 14, row.said, class_="figure", anchor="end", room=(NARROW - room) * LETTER / BOLD)
    return Markup("").join([text(0, y + 14, row.label, room=room), figure])


def _whisker(scale: Scale, ci95: Interval, y: float) -> list[Markup]:
    low, high = (scale(value) for value in ci95)
    return [line(low, y, high, y, "whisker"), *(line(x, y - 4, x, y + 4, "whisker") for x in (low, high))]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The times of one contender's calls."""

    label: str
    quantiles_ms: Sequence[float]  # 0 %, 5 %, … 100 %; empty if the report has none
    p50_ms: float
    p95_ms: float
    p99_ms: float
    std_ms: float
    count: int
    every_ms: Floats | None = None  # call by call, where the run's folder still has them

    @classmethod
    def of(cls, label: str, every_ms: Floats) -> Calls:
        """From every call."""
        p50, p95, p99 = map(float, np.percentile(every_ms, [50, 95, 99]))
        return cls(
            label=label,
            quantiles_ms=list(map(float, np.percentile(every_ms, np.arange(0, 101, 5)))),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            std_ms=float(every_ms.std(ddof=1)) if len(every_ms) > 1 else 0.0,
            count=len(every_ms),
            every_ms=every_ms,
        )

    @classmethod
    def summary(cls, label: str, latency: Latency) -> Calls:
        """From what the report says of them."""
        quantiles = latency.quantiles_ms if len(latency.quantiles_ms) == 21 else []
        return cls(
            label=label, quantiles_ms=quantiles, p50_ms=latency.p50_ms, p95_ms=latency.p95_ms, p99_ms=latency.p99_ms,
            std_ms=latency.std_ms, count=latency.calls,
        )  # fmt: skip

    def density(self, scale: Scale) -> list[tuple[float, float]]:
        """Places along `scale` and shares of calls there, the largest 1."""
        if self.every_ms is not None:
            edges = np.exp(np.linspace(math.log(scale.low), math.log(scale.high), BINS + 1))
            heights = np.histogram(self.every_ms, edges)[0].astype(float)
        else:
            edges = np.asarray(self.quantiles_ms)
            heights = 1 / np.maximum(np.diff(np.log(edges)), 1e-3)
        heights = heights / (heights.max() or 1.0)
        return [(scale(float(edges[i + side])), float(height)) for i, height in enumerate(heights) for side in (0, 1)]


def distributions(name: str, title: str, contenders: Sequence[Calls]) -> Markup:
    """Each contender's calls as a silhouette over a strip: 5–95 % thin, 25–75 % thick, a tick at the median."""
    low = min(calls.quantiles_ms[0] for calls in contenders)
    high = max(min(calls.quantiles_ms[-1], 1.15 * calls.p99_ms) for calls in contenders)
    scale = Scale(low * 0.97, max(high, low * 1.05) * 1.03, 12.0, WIDE - 12, log=True)
    row = 84.0
    bottom = len(contenders) * row + 4
    ticks = scale.ticks()
    parts = [line(scale(tick), 18, scale(tick), bottom, "grid") for tick in ticks]
    for i, calls in enumerate(contenders):
        y, quantile = i * row, calls.quantiles_ms
        parts.append(text(0, y + 12, calls.label, room=WIDE - 130))
        median = f"median {figures.milliseconds(quantile[10])}"
        parts.append(text(WIDE, y + 12, median, class_="figure", anchor="end"))
        shape = [(x, y + 60 - 40 * height) for x, height in calls.density(scale)]
        parts.append(path([(shape[0][0], y + 60), *shape, (shape[-1][0], y + 60)], f"silhouette c{i}"))
        parts.append(line(scale(quantile[1]), y + 68, scale(quantile[19]), y + 68, "whisker"))
        parts.append(rect(scale(quantile[5]), y + 64, scale(quantile[15]) - scale(quantile[5]), 8, f"box c{i}"))
        parts.append(line(scale(quantile[10]), y + 61, scale(quantile[10]), y + 75, "median"))
    for tick in ticks:
        parts.append(text(scale(tick), bottom + 13, figures.short(tick), class_="small", anchor="middle"))
    parts.append(text(WIDE, bottom + 28, "milliseconds of one call, logarithmic scale", class_="small", anchor="end"))
    return drawing(name, title, WIDE, bottom + 32, *parts)


def roofline(name: str, title: str, roof: Roofline) -> Markup | NotMeasured:
    """Operations per second over operations per byte: the two roofs, the overhead's, and where the model stands."""
    if min(roof.operations, roof.bytes, roof.compute_ms, roof.memory_ms, roof.overhead_ms, roof.p50_ms) <= 0:
        return NotMeasured("a roofline needs operations, bytes and times above 0")
    rate = roof.operations / 1e6  # giga-operations, once divided by milliseconds
    peak, bandwidth = rate / roof.compute_ms, roof.bytes / 1e6 / roof.memory_ms
    here, reached, overhead = roof.operations / roof.bytes, rate / roof.p50_ms, rate / roof.overhead_ms
    ridge = peak / bandwidth
    x = Scale(min(here, ridge) / 8, max(here, ridge) * 8, 40.0, WIDE - 6, log=True)
    lows = (reached, overhead, bandwidth * min(here, ridge))
    y = Scale(min(lows) / 4, max(peak, overhead) * 3, 220.0, 8.0, log=True)
    parts = [line(x(tick), 8, x(tick), 220, "grid") for tick in x.ticks()]
    parts += [line(40, y(tick), WIDE - 6, y(tick), "grid") for tick in y.ticks()]
    slope = [max(x.low, y.low / bandwidth), ridge, x.high]
    parts.append(path([(x(at), y(min(peak, bandwidth * at))) for at in slope], "roof"))
    parts.append(path([(x(x.low), y(overhead)), (x(x.high), y(overhead))], "roof overhead"))
    parts.append(line(x(here), y(min(peak, bandwidth * here, overhead)), x(here), y(reached), "whisker"))
    parts.append(tag("circle", cx=x(here), cy=y(reached), r=5, class_="dot"))
    right = x(here) > WIDE * 0.6
    parts.append(text(x(here) + (-9 if right else 9), y(reached) + 4, "this model", anchor="end" if right else "start"))
    parts.append(text(WIDE - 8, y(peak) - 6, "compute roof", class_="small", anchor="end"))
    parts.append(text(44, y(overhead) - 6, "overhead of a call", class_="small"))
    parts += [text(x(v), 234, figures.short(v), class_="small", anchor="middle") for v in x.ticks()]
    parts += [text(36, y(v) + 4, figures.short(v), class_="small", anchor="end") for v in y.ticks()]
    parts.append(text(WIDE - 6, 250, "operations per byte →", class_="small", anchor="end"))
    parts.append(text(0, 250, "↑ 10⁹ operations per second", class_="small"))
    return drawing(name, title, WIDE, 254, *parts)


def sustained(name: str, title: str, found: Sustained) -> Markup:
    """The median call in equal spans of a load without a pause, from zero."""
    scale = Scale(0.0, max(found.p50_ms) * 1.05, 110.0, 18.0)
    pitch = WIDE / len(found.p50_ms)
    parts = [line(0, 110, WIDE, 110, "whisker")]
    for i, value in enumerate(found.p50_ms):
        parts.append(rect(i * pitch + 4, scale(value), pitch - 8, 110 - scale(value), "kept"))
        middle = (i + 0.5) * pitch
        parts.append(text(middle, scale(value) - 4, figures.number(value), class_="small", anchor="middle"))
        until = f"{found.seconds * (i + 1) / len(found.p50_ms):.0f} s"
        parts.append(text(middle, 124, until, class_="small", anchor="middle"))
    return drawing(name, title, WIDE, 128, *parts)

"""Figures as a reader meets them: with a unit, three significant digits, and a reason where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from optpipe.report.schema import Cell, Interval, Latency, Measurement, NotMeasured, Quality, StageResult, Verdict

T = TypeVar("T")
MINUS = "−"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MARKS = {"ok": "✓", "unchanged": "=", "rolled_back": "↩", "failed": "✗", "over_budget": "!"}
STATUS = {
    "ok": "ok",
    "unchanged": "unchanged",
    "rolled_back": "rolled back",
    "failed": "failed",
    "over_budget": "over budget",
}


def words(value: T | NotMeasured, form: Callable[[T], str]) -> str:
    """`value` in the words of `form`, or why there is none."""
    return f"not measured: {value.not_measured}" if isinstance(value, NotMeasured) else form(value)


def number(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, without an exponent."""
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else "∞" if value > 0 else f"{MINUS}∞"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:,.{min(9, max(0, digits - 1 - magnitude))}f}".replace("-", MINUS)


def short(value: float) -> str:
    """As on an axis: three significant digits, without the zeros behind them."""
    said = number(value)
    return said.rstrip("0").rstrip(".") if "." in said else said


def scientific(value: float, decimals: int = 2) -> str:
    """As in 2.30 × 10⁻⁶; a power of ten without its 1."""
    if value == 0 or not math.isfinite(value):
        return number(value)
    mantissa, _, exponent = f"{value:.{decimals}e}".partition("e")
    power = f"10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    mantissa = mantissa.replace("-", MINUS)
    return power if not decimals and mantissa == "1" else f"{mantissa} × {power}"


def tick(value: float) -> str:
    """On the axis of any range."""
    return short(value) if value == 0 or 1e-3 <= abs(value) < 1e5 else scientific(value, 0)


def aligned(cells: Sequence[Cell]) -> list[str]:
    """A column of a table, its numbers with digits that are compared at a glance."""
    found = [cell for cell in cells if isinstance(cell, int | float)]
    form = _form_of_column(found)
    return ["–" if cell is None else cell if isinstance(cell, str) else form(cell) for cell in cells]


def _form_of_column(numbers: Sequence[float]) -> Callable[[float], str]:
    """Whole numbers; as many decimals for all; each its own; or powers of ten."""
    if all(isinstance(value, int) for value in numbers):
        return lambda value: f"{value:,}".replace("-", MINUS)
    sizes = [abs(value) for value in numbers if value]
    small, large = min(sizes, default=1.0), max(sizes, default=1.0)
    if small < 1e-4 or large >= 1e7:
        return scientific
    if large / small >= 1e3:
        return number
    decimals = 2 - math.floor(math.log10(large))
    decimals = max(0, decimals + (small < 10.0**-decimals))
    return lambda value: f"{value:,.{decimals}f}".replace("-", MINUS) if value else "0"


def signed(value: float, decimals: int) -> str:
    """With + or −, except what rounds to zero."""
    if not math.isfinite(value):
        return number(value)
    said = f"{value:+,.{decimals}f}"
    return said[1:] if not said.strip("+-0.") else said.replace("-", MINUS)


def size(value: float) -> str:
    """Bytes, in powers of 1000 as on a disk's label."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(value) >= bytes_:
            return f"{number(value / bytes_)} {unit}"
    return f"{value:.0f} bytes"


def milliseconds(value: float) -> str:
    return f"{number(value)} ms"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if abs(value) < 99.95 else f"{value:,.0f} s"


def joules(value: float) -> str:
    return f"{number(value * 1000)} mJ" if abs(value) < 1 else f"{number(value)} J"


def times(value: float) -> str:
    return f"{number(value)} ×"


def share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %").replace("-", MINUS)


def count(value: float) -> str:
    """Operations or bytes of one call."""
    for unit, size_ in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size_:
            return f"{number(value / size_)} {unit}"
    return f"{value:.0f}"


def probability(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def interval(value: Interval, form: Callable[[float], str] = number) -> str:
    """A 95 % interval; the unit is that of the figure before it."""
    return f"[{form(value[0])}, {form(value[1])}]"


def speedup(latency: Latency) -> str:
    """With its interval, against the model as it came in."""
    return f"{number(latency.speedup)} {interval(latency.speedup_ci95)}"


def verdict(value: Verdict | NotMeasured) -> str:
    return words(value, lambda said: {"faster": "▲ faster", "slower": "▼ slower", "same": "= same"}[said])


def compared(ratio: float, judged: Verdict) -> str:
    """A speed-up as a headline says it."""
    if judged == "same":
        return "no faster, no slower"
    return f"{number(ratio)} × faster" if judged == "faster" else f"{number(1 / ratio)} × slower"


def shrunk(before: float, after: float) -> str:
    """A size as a headline says it."""
    if after == before:
        return "the same size"
    return f"{number(before / after)} × smaller" if after < before else f"{number(after / before)} × larger"


def quality_value(quality: Quality, value: float | None = None) -> str:
    """The metric's value, or another on its scale."""
    value = quality.value if value is None else value
    return f"{value:.2%}".replace("%", " %") if quality.unit == "fraction" else number(value, 4)


def quality_unit(quality: Quality) -> str:
    return "points" if quality.unit == "fraction" else quality.metric


def quality_change(quality: Quality, value: float | None = None) -> str:
    """The difference from the baseline, or another: in points of a hundredth for a share. Without its unit."""
    value = quality.delta if value is None else value
    return signed(value * 100, 2) if quality.unit == "fraction" else signed(value, _decimals(quality))


def quality_delta(quality: Quality) -> str:
    """The difference from the baseline with its interval, without the unit."""
    return f"{quality_change(quality)} {interval(quality.delta_ci95, lambda value: quality_change(quality, value))}"


def _decimals(quality: Quality) -> int:
    """So many that the interval of the difference is seen."""
    widest = max(abs(value) for value in (*quality.delta_ci95, quality.delta))
    return min(9, max(0, 2 - math.floor(math.log10(widest)))) if widest and math.isfinite(widest) else 2


def p50(measurement: Measurement | NotMeasured) -> str:
    """The median call of the headline."""
    latency = headline(measurement)
    return words(latency, lambda found: milliseconds(found.p50_ms))


def headline(measurement: Measurement | NotMeasured) -> Latency | NotMeasured:
    """Latency at batch 1 with the target's threads, or why there is none."""
    if isinstance(measurement, NotMeasured):
        return measurement
    if isinstance(measurement.latency, NotMeasured):
        return measurement.latency
    return measurement.headline() or NotMeasured("batch 1 with the target's threads was not timed")


def step_name(stage: StageResult) -> str:
    return stage.stage if stage.stage.startswith(f"{stage.key}/") else f"{stage.key} ({stage.stage})"

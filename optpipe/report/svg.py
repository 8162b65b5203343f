"""The few parts of SVG that the charts are made of. Text that is passed in is escaped; colours are CSS classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

LETTER = 6.3  # width of an average character of the charts' text, in units of the drawing


def tag(name: str, *children: Markup | str, **attributes: float | str) -> Markup:
    """An element; `class_` and `text_anchor` become class and text-anchor, numbers have two decimals."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value)) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


def drawing(name: str, title: str, width: float, height: float, *children: Markup) -> Markup:
    """An image that screen readers call `title`; `name` is its id on the page."""
    head = tag("title", title, id=f"{name}-title")
    box = {"viewBox": f"0 0 {_plain(width)} {_plain(height)}", "id": name, "aria-labelledby": f"{name}-title"}
    return tag("svg", head, *children, **box, role="img")


def text(x: float, y: float, said: str, *, class_: str = "", anchor: str = "start", room: float = 0.0) -> Markup:
    """Text; what is wider than `room` (0: no limit) is cut with an ellipsis and whole in its tooltip."""
    letters = int(room / LETTER)
    if room and len(said) > letters:
        return tag("text", tag("title", said), f"{said[: letters - 1]}…", x=x, y=y, class_=class_, text_anchor=anchor)
    return tag("text", said, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    return tag("rect", x=x, y=y, width=max(0.0, width), height=max(0.0, height), class_=class_)


def path(points: list[tuple[float, float]], class_: str) -> Markup:
    d = " ".join(f"{'L' if i else 'M'}{_plain(x)} {_plain(y)}" for i, (x, y) in enumerate(points))
    return tag("path", d=d, class_=class_)


@dataclass(frozen=True)
class Scale:
    """From a value to a place; a value beyond the ends is at the end."""

    low: float
    high: float
    start: float  # place of `low`
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (self._inner(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)

    def _inner(self, value: float) -> float:
        return math.log(value) if self.log else value

    def ticks(self, count: int = 4) -> list[float]:
        """Round values in the range: 1, 2 and 5 times powers of ten where that gives enough, else evenly spaced."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**power for power in powers for m in (1, 2, 5) if self.low <= m * 10.0**power <= self.high]
            if len(found) > 2 * count:
                found = [value for value in found if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
            if len(found) >= 3:
                return found
        raw = (self.high - self.low) / count
        if raw <= 0:
            return [self.low]
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")

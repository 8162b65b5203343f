"""A stage's table as the page shows it: aligned figures, and pictures of the columns that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from optpipe.report import figures
from optpipe.report.charts import BOLD, NARROW
from optpipe.report.schema import Cell, NotMeasured, Table
from optpipe.report.svg import LETTER, Scale, drawing, line, path, rect, tag, text

LONG = 30  # rows that a table shows without being unfolded
MOST_BARS = 60  # rows with a label of their own
DECADES = 1e3  # a range that only a logarithmic scale shows
HEIGHT = 200.0  # of the lines
PITCH = 9.0  # of the bars of one row


@dataclass(frozen=True)
class Series:
    """One column of a picture."""

    name: str
    values: Sequence[Cell]
    words: Sequence[str]

    @property
    def numbers(self) -> list[float]:
        return [value for value in self.values if isinstance(value, int | float)]


class View:
    """The parts of one table. `name` starts the ids of its pictures."""

    def __init__(self, table: Table, name: str) -> None:
        self.table, self.name = table, name
        self._words = [figures.aligned(table.column(column)) for column in table.columns]

    @property
    def is_long(self) -> bool:
        return len(self.table.rows) > LONG

    @property
    def texts(self) -> list[str]:
        """The columns without a number."""
        return [column for column in self.table.columns if not self._series(column).numbers]

    def _series(self, column: str) -> Series:
        return Series(column, self.table.column(column), self._words[self.table.columns.index(column)])

    def rows(self) -> list[list[str]]:
        return [list(row) for row in zip(*self._words, strict=True)]

    def pictures(self) -> list[Markup | NotMeasured]:
        """Of the columns that the table names."""
        return [
            self._picture(f"{self.name}-{number}", names)
            for number, names in enumerate(map(Table.drawn, self.table.chart), 1)
        ]

    def _picture(self, name: str, columns: list[str]) -> Markup | NotMeasured:
        first, *series = map(self._series, [self.table.columns[0], *columns])
        title = f"{self.table.title}: {', '.join(columns)}"
        if not any(one.numbers for one in series):
            return NotMeasured(f"there is no number in {' and '.join(columns)}")
        if len(first.numbers) == len(first.values):
            return lines(name, title, first.numbers, first.name, series)
        if len(first.values) > MOST_BARS:
            return lines(name, title, range(1, len(first.values) + 1), f"{first.name}, by row", series)
        return bars(name, title, first.words, series)


def bars(name: str, title: str, labels: Sequence[str], series: Sequence[Series]) -> Markup:
    """A row for each label: bars from zero, or marks where only a logarithmic scale shows all of them."""
    scale = _scale(series, 6.0, NARROW - 6, from_zero=True)
    top = _legend_height(series)
    row = 24 + (PITCH if scale.log else PITCH * len(series))
    bottom = top + len(labels) * row
    ticks = _ticks(scale)
    parts = _legend(series)
    for i, label in enumerate(labels):
        y = top + i * row
        parts += [line(scale(tick), y + 17, scale(tick), y + row, "grid") for tick in ticks]
        parts.append(_row_label(label, " / ".join(one.words[i] for one in series), y + 13))
        for j, one in enumerate(series):
            value = one.values[i]
            if not isinstance(value, int | float):
                continue
            if scale.log:
                parts.append(_mark(j, scale(value), y + 23))
            else:
                left, right = sorted((scale(0), scale(value)))
                parts.append(rect(left, y + 18 + j * PITCH, right - left, PITCH - 2, f"series{j}"))
        if not scale.log:
            parts.append(line(scale(0), y + 17, scale(0), y + row, "whisker"))
    parts += [text(scale(tick), bottom + 13, figures.tick(tick), class_="small", anchor="middle") for tick in ticks]
    return drawing(name, title, NARROW, bottom + 18, *parts)


def lines(name: str, title: str, at: Sequence[float], of: str, series: Sequence[Series]) -> Markup:
    """Lines over numbers, in their order."""
    x = Scale(min(at), max(at), 52.0, NARROW - 10)
    top = _legend_height(series) + 8
    y = _scale(series, top + HEIGHT, top, from_zero=False)
    parts = [*_legend(series), *(line(52, y(tick), NARROW - 10, y(tick), "grid") for tick in _ticks(y))]
    order = sorted(range(len(at)), key=lambda i: at[i])
    for j, one in enumerate(series):
        known = [(at[i], value) for i in order if isinstance(value := one.values[i], int | float)]
        points = [(x(where), y(value)) for where, value in known]
        parts.append(path(points, f"trace series{j}"))
        parts += [_mark(j, *point) for point in points if len(points) <= MOST_BARS]
    parts += [text(46, y(tick) + 4, figures.tick(tick), class_="small", anchor="end") for tick in _ticks(y)]
    bottom = top + HEIGHT + 17
    parts += [text(x(tick), bottom, figures.tick(tick), class_="small", anchor="middle") for tick in x.ticks()]
    parts.append(text(NARROW - 10, bottom + 17, f"{of} →", class_="small", anchor="end"))
    return drawing(name, title, NARROW, bottom + 22, *parts)


def _scale(series: Sequence[Series], start: float, end: float, *, from_zero: bool) -> Scale:
    """Over all of `series`: logarithmic for positive numbers of very different size; bars start from zero."""
    numbers = [number for one in series for number in one.numbers]
    low, high = min(numbers), max(numbers)
    if low > 0 and high / low >= DECADES:
        return Scale(low / 1.5, high * 1.5, start, end, log=True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = 0.0 if from_zero else 0.05 * (high - low)
    return Scale(low - room, high + room if high > low else low + 1, start, end)


def _ticks(scale: Scale) -> list[float]:
    """At most six, since powers of ten may be many."""
    found = scale.ticks()
    return found[:: -(-len(found) // 6)]


def _row_label(label: str, said: str, y: float) -> Markup:
    """A label is cut in the middle: names of layers tell themselves apart at their ends."""
    letters = int((NARROW - 12 - BOLD * len(said)) / LETTER)
    figure = text(NARROW, y, said, class_="figure", anchor="end")
    if len(label) <= letters:
        return Markup("").join([text(0, y, label), figure])
    half = max(4, (letters - 1) // 2)
    short = tag("text", tag("title", label), f"{label[:half]}…{label[-half:]}", x=0.0, y=y)
    return Markup("").join([short, figure])


def _legend_height(series: Sequence[Series]) -> float:
    return 18.0 * len(series) + 8


def _legend(series: Sequence[Series]) -> list[Markup]:
    return [part for j, one in enumerate(series) for part in (_mark(j, 8, 9 + 18 * j), text(20, 13 + 18 * j, one.name))]


def _mark(series: int, x: float, y: float) -> Markup:
    """A dot, a ring around it, and a square: told apart without colour, and where they coincide."""
    if series == 2:
        return rect(x - 4, y - 4, 8, 8, "mark series2")
    return tag("circle", cx=x, cy=y, r=(3.5, 5.5)[series], class_=f"mark series{series}")

"""The space of a search: each dimension an override with several values, written as for any sweep of Hydra's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.errors import did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIGITS = 6  # of a number drawn from an interval


@dataclass(frozen=True)
class Choice:
    """One of several values, as they stand behind `=`."""

    key: str
    values: tuple[str, ...]

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def text(self, value: float | str) -> str:
        return str(value)

    def read(self, value: float | str) -> float | str:
        """What a person wrote for it. Raises ValueError for what is none of its values."""
        if str(value) not in self.values:
            raise ValueError(f"'{self.key}' is {value}, which is none of {', '.join(self.values)}")
        return str(value)

    @property
    def ends(self) -> tuple[str, ...]:
        """Values that stand for all where each is checked before the run."""
        return self.values


@dataclass(frozen=True)
class Numbers:
    """An interval, or the steps of a range; whole numbers, or drawn on a logarithmic scale."""

    key: str
    low: float
    high: float
    step: float | None = None
    whole: bool = False
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"'{self.key}' is drawn from {self.low:g} to {self.high:g}, which holds no number")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"'{self.key}' is drawn on a logarithmic scale, which needs an interval above 0")

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def text(self, value: float | str) -> str:
        return str(int(value)) if self.whole else f"{float(value):.{DIGITS}g}"

    def read(self, value: float | str) -> float | str:
        """What a person wrote for it. Raises ValueError for what is none of its values."""
        if isinstance(value, str) or not self.low <= value <= self.high:
            raise ValueError(f"'{self.key}' is {value}, which is not between {self.low:g} and {self.high:g}")
        return int(value) if self.whole else float(value)

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.text(self.low), self.text(self.high))


Dimension = Choice | Numbers


@dataclass(frozen=True)
class Space:
    """What a command lets a search choose, and what it fixes."""

    fixed: tuple[str, ...]  # overrides that all jobs have
    dimensions: tuple[Dimension, ...]

    def overrides(self, params: dict[str, float | str]) -> list[str]:
        """Those of one job. params: a value for each dimension, by key."""
        chosen = [f"{found.key}={found.text(params[found.key])}" for found in self.dimensions]
        return [*self.fixed, *chosen]

    def read(self, given: dict[str, float | str]) -> dict[str, float | str]:
        """Values that a person wrote, by key. Raises ValueError for a key that is not searched, or one of no use."""
        known = {found.key: found for found in self.dimensions}
        for key in given:
            if key not in known:
                raise ValueError(f"'{key}' is not searched{did_you_mean(key, known)}")
        return {key: known[key].read(value) for key, value in given.items()}

    @property
    def size(self) -> float:
        """How many combinations there are."""
        product = 1.0
        for found in self.dimensions:
            product *= _count(found)
        return product


def _count(dimension: Dimension) -> float:
    if isinstance(dimension, Choice):
        return len(dimension.values)
    if dimension.low == dimension.high:
        return 1
    step = dimension.step or (1 if dimension.whole else 0)
    return round((dimension.high - dimension.low) / step) + 1 if step else float("inf")

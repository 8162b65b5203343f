"""The settings under `measure:`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Measure:
    """How long to measure, and when a figure is good enough."""

    replicas: int = 2  # worker processes per contender: two processes with one model differ by up to 1.4 %
    block_seconds: float = 0.04  # of consecutive calls of one contender before the next one's turn
    min_rounds: int = 6  # a round is one block of every contender
    max_seconds: float = 3.0  # of one comparison
    interval_width: float = 0.03  # stop early once the 95 % interval of the ratio is this narrow, relative
    margin: float = 0.02  # ratios closer to 1 than this are `same`
    timeout_seconds: float = 120.0  # a worker that is silent for longer is killed

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.min_rounds < 3:
            raise ValueError(
                f"replicas is {self.replicas} and min_rounds {self.min_rounds}; they must be at least 1 and 3"
            )
        for name in ("block_seconds", "max_seconds", "interval_width", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.margin < 0:
            raise ValueError(f"margin is {self.margin}; it must not be negative")

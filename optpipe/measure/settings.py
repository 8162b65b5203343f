"""The settings under `measure:`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class Measure:
    """How long to measure, and when a figure is good enough."""

    replicas: int = 6  # fresh processes per contender, at least: two with one model differ by up to a few per cent
    rounds: int = 5  # in each of them; a round is one block of every contender
    block_seconds: float = 0.01  # of consecutive calls of one contender before the next one's turn
    max_seconds: float = 3.0  # after which a comparison gets no further replicas
    interval_width: float = 0.05  # stop once the 95 % intervals of the ratios are this narrow, relative
    noise_limit: float = 0.4  # an interval that is still wider than this is no figure: the machine is too noisy
    margin: float = 0.02  # ratios closer to 1 than this are `same`
    timeout_seconds: float = 120.0  # a worker that is silent for longer is killed
    previews: bool = True  # measure steps before the export too, each as a file exported only for that
    explain: bool = True  # look into what the runtime executes: causes, operators, roofline
    fresh: bool = False  # time again what was timed on this machine before
    profile: bool = False  # keep the runtime's and torch's profiles of the final model and the baseline

    def __post_init__(self) -> None:
        if self.replicas < 2 or self.rounds < 1:
            raise ValueError(f"replicas is {self.replicas} and rounds {self.rounds}; they must be at least 2 and 1")
        for name in ("block_seconds", "max_seconds", "interval_width", "noise_limit", "timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.noise_limit < self.interval_width:
            raise ValueError(
                f"noise_limit is {self.noise_limit} and interval_width {self.interval_width}; a figure cannot be "
                "narrow enough and too noisy at once, so noise_limit must not be below it"
            )
        if self.margin < 0:
            raise ValueError(f"margin is {self.margin}; it must not be negative")

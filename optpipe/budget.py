"""Budget: what the user will not give up, and what happens when a run's result breaks it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from optpipe.report import Measurement, NotMeasured


class Policy(Enum):
    """What a broken limit does: `warn` finishes and says so, `stop` ends with a non-zero exit code."""

    warn = "warn"
    stop = "stop"


@dataclass(kw_only=True)
class Budget:
    """Limits of the finished run; null leaves one out. Quality is judged on validation samples, never on test."""

    quality_drop: float | None = None  # at most, as a fraction: 0.01 is one point
    p50_ms: float | None = None  # at most, at batch 1 on the target
    size_bytes: int | None = None  # at most, of the deployed file
    policy: Policy = Policy.warn

    def __post_init__(self) -> None:
        for name in ("quality_drop", "p50_ms", "size_bytes"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (value == 0 and name != "quality_drop")):
                raise ValueError(f"{name} is {value}; it must be above 0, or null for no limit")

    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        limits = {"quality_drop": self.quality_drop, "p50_ms": self.p50_ms, "size_bytes": self.size_bytes}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def quality_violations(self, validation_drop: float) -> list[str]:
        """The quality limit, if a model that lost `validation_drop` of quality on validation breaks it."""
        if self.quality_drop is None or validation_drop <= self.quality_drop:
            return []
        return [
            f"quality_drop is {validation_drop * 100:.2f} points on validation, "
            f"above the limit of {self.quality_drop * 100:.2f}"
        ]

    def violations(self, validation_drop: float, measurement: Measurement) -> list[str]:
        """Every limit that the measured model breaks; a limit on a figure that could not be measured is broken."""
        found = self.quality_violations(validation_drop)
        if self.p50_ms is not None:
            fastest = measurement.headline()
            if fastest is None:
                found.append("p50_ms was not measured, so its limit cannot be shown to hold")
            elif fastest.p50_ms > self.p50_ms:
                found.append(f"p50_ms is {fastest.p50_ms:.3f}, above the limit of {self.p50_ms:g}")
        if self.size_bytes is not None:
            if isinstance(measurement.size_bytes, NotMeasured):
                found.append("size_bytes was not measured, so its limit cannot be shown to hold")
            elif measurement.size_bytes > self.size_bytes:
                found.append(f"size_bytes is {measurement.size_bytes}, above the limit of {self.size_bytes}")
        return found

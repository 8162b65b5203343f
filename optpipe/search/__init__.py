"""Search: a sweep whose jobs are chosen one after the other, by Optuna, from what the ones before have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from optpipe.errors import did_you_mean
from optpipe.search.objectives import GOAL, OBJECTIVES


class Sampler(Enum):
    """Who chooses the next trial."""

    tpe = "tpe"  # Tree-structured Parzen estimator (Bergstra et al. 2011), of several objectives too
    nsga2 = "nsga2"  # NSGA-II (Deb et al. 2002), for hundreds of trials
    gp = "gp"  # Gaussian processes, for few trials of few numbers
    random = "random"


@dataclass(kw_only=True)
class Settings:
    """The settings under `hydra.sweeper:`, with hydra/sweeper=search."""

    trials: int = 30  # of the study in all, those that failed among them
    sampler: Sampler = Sampler.tpe
    objectives: list[str] = field(default_factory=lambda: ["quality", "latency"])
    weights: dict[str, float] = field(default_factory=dict)  # of a sum in their place: {quality: 1, latency: 0.05}
    prune: bool = True  # end a job after the first step that breaks the budget's limit on quality
    study: str | None = None  # its name in the storage; null: that of the sweep's folder
    storage: str | None = None  # URI of a database; null: study.db in the sweep's folder
    at_once: int | None = None  # trials that are chosen and launched together; null: as many as the launcher runs
    seed: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)  # settings to try before the sampler chooses
    params: dict[str, Any] = field(default_factory=dict)  # dimensions beside those of the command, as Hydra's own

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}; it must be at least 1")
        if self.at_once is not None and self.at_once < 1:
            raise ValueError(
                f"at_once is {self.at_once}; it must be at least 1, or null for as many as the launcher runs"
            )
        if not self.objectives and not self.weights:
            raise ValueError(f"objectives is empty; name some of {', '.join(OBJECTIVES)}")
        for name in (*self.objectives, *self.weights):
            if name not in (OBJECTIVES if name in self.weights else (*OBJECTIVES, GOAL)):
                hint = did_you_mean(name, OBJECTIVES) or f"; there are {', '.join(OBJECTIVES)}"
                raise ValueError(f"there is no objective '{name}'{hint}")
        if repeated := [name for name in self.objectives if self.objectives.count(name) > 1]:
            raise ValueError(f"objectives names '{repeated[0]}' twice")
        if GOAL in self.objectives and len(self.objectives) > 1:
            raise ValueError(f"objectives names '{GOAL}' beside others; it is one alone")
        if wrong := [name for name, weight in self.weights.items() if not weight >= 0]:
            raise ValueError(f"weights.{wrong[0]} is {self.weights[wrong[0]]}; it must be at least 0")

    @property
    def is_for_goal(self) -> bool:
        """Whether it ends once a run keeps all limits."""
        return not self.weights and self.objectives == [GOAL]


def weighed(weights: Mapping[str, float], figures: Mapping[str, float]) -> float:
    """Σ weight · figure; less is better."""
    return sum(weight * figures[name] for name, weight in weights.items())


def read_weights(words: Sequence[str]) -> dict[str, float]:
    """From "quality=1", "latency=0.05". Raises ValueError for what names no objective or is no number."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, number = word.partition("=")
        if not equals:
            raise ValueError(f"weight '{word}' is not of the form quality=1")
        found[name] = float(number)
    return Settings(weights=found).weights

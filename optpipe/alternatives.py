"""Alternatives that were tried: which of them to take, branches of the pipeline or engines for one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optpipe import contest
from optpipe.artifact import Artifact
from optpipe.contest import Entrant
from optpipe.context import Benchmarks
from optpipe.judge import Judge
from optpipe.measure import quality
from optpipe.report import Attempt, NotMeasured, StageResult, figures
from optpipe.state import State


@dataclass
class Branch:
    """An alternative that was tried."""

    method: str
    refused: str = ""  # why it is not to be taken
    state: State | None = None  # None if it failed
    entrant: Entrant | None = None
    results: list[StageResult] = field(default_factory=list)

    def attempt(self, chosen: bool) -> Attempt:
        """For the report."""
        seconds = sum(result.seconds for result in self.results)
        if self.entrant is None:
            return Attempt(method=self.method, ok=False, reason=self.refused, seconds=seconds)
        measurement, drop = self.entrant.measurement, self.entrant.drop
        parts = [self.refused, self.entrant.said(), *self.entrant.broken.values()]
        return Attempt(
            method=self.method,
            ok=not self.refused,
            reason="; ".join(dict.fromkeys(filter(None, parts))),
            chosen=chosen,
            seconds=seconds,
            latency=figures.headline(measurement),
            size_bytes=measurement.size_bytes,
            quality_drop=drop.value,
            quality_drop_ci95=drop.ci95,
        )


def chosen(how: Literal["first_of", "best_of"], branches: Sequence[Branch], margin: float) -> Branch | None:
    """The first branch that keeps its limits, or the best; None where none is to be taken."""
    able = [branch for branch in branches if branch.entrant and not branch.refused]
    if not able:
        return None
    entrants = [branch.entrant for branch in able if branch.entrant]
    if how == "first_of":
        return next((branch for branch in able if branch.entrant and not branch.entrant.broken), able[0])
    best = contest.best(entrants, margin)
    return next(branch for branch in able if branch.entrant is best)


def refusal(judge: Judge, entrant: Entrant, state: State, original: Entrant | None, before: State) -> str:
    """Why a branch that ran is not to be taken: the quality that it lost, or that it is no better than `original`.

    original: the model before it, where that competes. Where it breaks the limit on quality too, whatever is better
        goes on.
    """
    if original is None or "quality_drop" not in original.broken:
        if lost := entrant.broken.pop("quality_drop", ""):
            return lost
    if original is None:
        return ""
    if state.artifact.hash == before.artifact.hash:
        return "it changed nothing"

    def gains_quality() -> bool:
        ours, theirs = judge.measurer.validation(state.artifact), judge.measurer.validation(before.artifact)
        return quality.drop_interval(ours, theirs)[1] < 0

    return contest.shortcoming(entrant, original, judge.margin, gains_quality)


def choose_engine(
    key: str, folder: Path, result: StageResult, judge: Judge, model: Any, names: Sequence[str], found: Benchmarks
) -> None:
    """The fastest engine inside the budget at batch 1; of those not told apart the fastest over all batch sizes.

    Then the one that loses least quality, then the target's, which comes first.

    key, folder, result: of the step that asks.
    """
    artifact = Artifact.save(model, folder)
    entrants: dict[str, Entrant] = {}
    for name, measurement in judge.measurer.engines(artifact, names).items():
        state = State(artifact, measurement, results=0, engine=name)
        if measurement.headline() is None or isinstance(measurement.quality, NotMeasured):
            lost = measurement.latency if measurement.headline() is None else measurement.quality
            reason = lost.not_measured if isinstance(lost, NotMeasured) else "it was not timed at batch 1"
            result.attempts.append(Attempt(method=name, ok=False, reason=reason))
        else:
            entrants[name] = judge.entrant(key, state)
    if not entrants:
        return
    best = contest.best_engine(list(entrants.values()), judge.margin)
    for name, entrant in entrants.items():
        result.attempts.append(Branch(name, entrant=entrant).attempt(entrant is best))
    found.engine, found.in_engine = next((n, e.measurement) for n, e in entrants.items() if e is best)
    others = "; ".join(
        f"{name}: {entrant.said()}, {figures.times(entrant.mean_speed)} over all batch sizes"
        for name, entrant in entrants.items()
    )
    why = "none of these is inside the budget" if best.broken else "inside the budget the fastest"
    result.notes.append(f"{found.engine} runs the model from here on; {why}: {others}")

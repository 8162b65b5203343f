"""Plan: a composed and checked recipe. Everything that a run needs, without Hydra."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optpipe import registry
from optpipe.budget import Budget, Policy
from optpipe.errors import OptpipeError, did_you_mean
from optpipe.measure.settings import Measure
from optpipe.registry import Stage, StageInfo
from optpipe.sources import Data, Model
from optpipe.target import Target
from optpipe.tracking import Tracking

CONFIG = "config.json"
OF_ANY_FORM = ("quality_drop", "size_bytes", "size_ratio")  # limits on what needs no runtime
SPOKEN = {
    "torch": "a torch module",
    "program": "an exported program",
    "torchscript": "a TorchScript module",
    "onnx": "an ONNX file",
}


@dataclass(frozen=True)
class Step:
    """One stage with its settings."""

    key: str
    stage: Stage
    info: StageInfo
    settings: str = ""  # those that `relax` lists, in words, where it lists some


@dataclass(frozen=True)
class Choice:
    """Alternatives for one place in the pipeline; each branch is a list of steps."""

    how: Literal["first_of", "best_of"]
    branches: tuple[tuple[Step, ...], ...]

    @property
    def key(self) -> str:
        return f"{self.how}_" + "_".join("+".join(step.key for step in branch) for branch in self.branches)


Entry = Step | Choice


def steps_of(entries: Sequence[Entry]) -> list[Step]:
    """Every step of `entries`, those of alternatives among them."""
    return [
        step for entry in entries for step in ([entry] if isinstance(entry, Step) else itertools.chain(*entry.branches))
    ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do, to what, and how to measure it."""

    recipe: str
    overrides: list[str]
    entries: tuple[Entry, ...]
    target: Target
    budget: Budget
    measure: Measure
    tracking: Tracking
    model: Model
    data: Data
    seed: int
    device: str
    dry_run: bool
    relax: dict[str, list[Step]]  # by step: milder ones, in the order to try them
    config: dict[str, Any]  # the resolved configuration, for the record only
    command: str = ""  # that repeats the run, for the record only

    @property
    def subject(self) -> str:
        return f"+recipe={self.recipe}" if self.recipe else "this pipeline"


def write_config(config: dict[str, Any], folder: Path) -> None:
    """Keep the resolved configuration in a run's folder."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in `folder`. Raises OptpipeError if there is none."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise OptpipeError(f"{folder / CONFIG} cannot be read ({error}); name the folder of a run") from None
    return config


def chain_problems(entries: Sequence[Entry], form: str = "torch") -> list[str]:
    """What is wrong with the order of `entries`, given the form of the model that comes in."""
    problems: list[str] = []
    before = "the model"
    for entry in entries:
        if isinstance(entry, Step):
            form = _after(entry, form, before, problems)
            before = f"step '{entry.key}' before it"
            continue
        forms = {_after_branch(branch, form, before, problems) for branch in entry.branches}
        if len(forms) > 1:
            spoken = " or ".join(SPOKEN.get(name, name) for name in sorted(forms))
            problems.append(f"{entry.how} gives {spoken}, depending on the branch; every branch must give the same")
        form, before = sorted(forms)[0], f"{entry.how} before it"
    return problems


def _after_branch(branch: Sequence[Step], form: str, before: str, problems: list[str]) -> str:
    for step in branch:
        form = _after(step, form, before, problems)
        before = f"step '{step.key}' before it"
    return form


def _after(step: Step, form: str, before: str, problems: list[str]) -> str:
    """The form after `step`; a problem is added if it cannot take what it is given."""
    if form not in step.info.takes:
        taken = " or ".join(SPOKEN.get(name, name) for name in step.info.takes)
        bridges = [info.name for info in registry.stages() if form in info.takes and info.gives in step.info.takes]
        if bridges:
            remedy = f"; put a step between them that makes one, such as {bridges[0]}"
        else:
            remedy = f"; move '{step.key}' before it" if before.startswith("step") else ""
        problems.append(f"step '{step.key}' takes {taken}, but {before} gives {SPOKEN.get(form, form)}{remedy}")
    return form if step.info.gives == "same" else step.info.gives


def budget_problems(
    entries: Sequence[Entry], budget: Budget, measure: Measure, relax: dict[str, list[Step]], deployed: str
) -> list[str]:
    """Limits that contradict one another, the pipeline or how it is measured. deployed: the form that is timed."""
    after = {entry.key: form for entry, _, form in forms_along(entries)}
    problems = []
    for key, limits in budget.stages.items():
        where = f"budget.stages.{key}"
        if key not in after:
            problems.append(f"{where}: pipeline has no step '{key}'{did_you_mean(key, list(after))}")
            continue
        own, run = limits.quality_drop, budget.quality_drop
        if own is not None and run is not None and own > run and not _waits(entries, key):
            problems.append(
                f"{where}.quality_drop={own:g} contradicts budget.quality_drop={run:g}, which must hold after every "
                "step; lower the first or raise the second"
            )
        if not measure.previews and after[key] != deployed and set(limits.limits()) - {"quality_drop"}:
            problems.append(f"{where} limits what measure.previews=false leaves unmeasured; set measure.previews=true")
    if timed := [name for name in budget.limits() if name not in OF_ANY_FORM]:
        form = forms_along(entries)[-1][2]
        if form != deployed:
            problems.append(
                f"budget.{timed[0]} limits what is measured on the target, but the pipeline ends with {SPOKEN[form]}, "
                "which it does not run; end the pipeline with an export"
            )
    for entry in entries:
        if isinstance(entry, Choice) and entry.how == "best_of" and after[entry.key] != deployed:
            if not measure.previews:
                problems.append(
                    f"{entry.key} takes the fastest, which measure.previews=false leaves unmeasured; set "
                    "measure.previews=true"
                )
    if budget.policy is Policy.relax and not any(relax.values()):
        problems.append("budget.policy is relax, but relax lists no milder settings; relax: {prune: [{ratio: 0.3}]}")
    return problems


def _waits(entries: Sequence[Entry], key: str) -> bool:
    return any(isinstance(entry, Step) and entry.key == key and entry.info.needs_recovery for entry in entries)


def forms_along(entries: Sequence[Entry], form: str = "torch") -> list[tuple[Entry, str, str]]:
    """Each entry with the form before and after it, for a chain without problems."""
    along = []
    for entry in entries:
        after = form
        for step in (entry,) if isinstance(entry, Step) else entry.branches[0]:
            after = after if step.info.gives == "same" else step.info.gives
        along.append((entry, form, after))
        form = after
    return along

"""Plan: a composed and checked recipe. Everything that a run needs, without Hydra."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optpipe import registry
from optpipe.budget import Budget, Policy
from optpipe.errors import OptpipeError, StageError, did_you_mean
from optpipe.forms import SPOKEN, Form, form_of
from optpipe.measure.settings import Measure
from optpipe.registry import Stage, StageInfo
from optpipe.runtimes import RUNTIMES
from optpipe.schedule import Schedule
from optpipe.sources import Data, Model
from optpipe.store import Settings as StoreSettings
from optpipe.target import Target
from optpipe.tracking import Tracking

CONFIG = "config.json"
OF_ANY_FORM = ("quality_drop", "size_bytes", "size_ratio")  # limits on what needs no runtime


@dataclass(frozen=True)
class Step:
    """One stage with its settings."""

    key: str
    stage: Stage
    info: StageInfo
    settings: str = ""  # those that `relax` lists, in words, where it lists some

    def gives(self, before: frozenset[str]) -> frozenset[str]:
        """The forms that a model may have after this step, given those that it may have before it."""
        return frozenset().union(
            *(before if name == "same" else {name} for name in registry.gives_of(self.stage, self.info))
        )

    def form_after(self, before: str, model: Any) -> Form:
        """The form of `model`, which this step made of one in the form `before`. StageError if it gives another."""
        found, wanted = form_of(model), self.gives(frozenset({before}))
        if found is None or found.NAME not in wanted:
            named = " or ".join(f"'{name}'" for name in sorted(wanted))
            raise StageError(f"stage '{self.info.name}' gives form {named} but returned {type(model).__name__}")
        return found


@dataclass(frozen=True)
class Choice:
    """Alternatives for one place in the pipeline; each branch is a list of steps."""

    how: Literal["first_of", "best_of"]
    branches: tuple[tuple[Step, ...], ...]
    absent: tuple[tuple[str, str], ...] = ()  # branches that cannot run here: their steps, and why

    @property
    def key(self) -> str:
        return f"{self.how}_" + "_".join(map(method_of, self.branches))


Entry = Step | Choice


def method_of(branch: Sequence[Step]) -> str:
    """What a branch is called in the report."""
    return "+".join(step.key for step in branch)


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
    store: StoreSettings
    model: Model
    data: Data
    seed: int
    device: str
    dry_run: bool
    relax: dict[str, list[Step]]  # by step: milder ones, in the order to try them
    config: dict[str, Any]  # the resolved configuration, for the record only
    command: str = ""  # that repeats the run, for the record only
    rehearse: bool | None = None  # None where the plan holds a stage that trains

    @property
    def subject(self) -> str:
        return f"+recipe={self.recipe}" if self.recipe else "this pipeline"

    @property
    def is_rehearsed(self) -> bool:
        """Whether the chain runs once on two batches first."""
        return (
            any(isinstance(step.stage, Schedule) for step in steps_of(self.entries))
            if self.rehearse is None
            else (self.rehearse)
        )

    def seed_of(self, key: str) -> int:
        """The seed of a step, which does not depend on those before it."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {key}".encode()).digest()[:4], "big")


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


def spoken(forms: Iterable[str]) -> str:
    """As in "an ONNX file or an OpenVINO IR"."""
    return " or ".join(SPOKEN.get(name, name) for name in sorted(forms))


def chain_problems(entries: Sequence[Entry], form: str = "torch") -> list[str]:
    """What is wrong with the order of `entries`, given the form of the model that comes in.

    After alternatives the model may have any of the forms that they give, and the next step must take them all.
    """
    problems: list[str] = []
    forms, before = frozenset({form}), "the model"
    for entry in entries:
        if isinstance(entry, Step):
            forms = _after(entry, forms, before, problems)
            before = f"step '{entry.key}' before it"
        else:
            forms = frozenset().union(*(_after_branch(branch, forms, before, problems) for branch in entry.branches))
            before = f"{entry.how} before it"
    return problems


def _after_branch(branch: Sequence[Step], forms: frozenset[str], before: str, problems: list[str]) -> frozenset[str]:
    for step in branch:
        forms = _after(step, forms, before, problems)
        before = f"step '{step.key}' before it"
    return forms


def _after(step: Step, forms: frozenset[str], before: str, problems: list[str]) -> frozenset[str]:
    """The forms after `step`; a problem is added if it cannot take one that it may be given."""
    if refused := forms - set(step.info.takes):
        form = sorted(refused)[0]
        bridges = [info.name for info in registry.stages() if form in info.takes and info.gives in step.info.takes]
        if len(forms) > 1:
            remedy = f", depending on the branch; it cannot take {SPOKEN.get(form, form)}"
        elif bridges:
            remedy = f"; put a step between them that makes one, such as {bridges[0]}"
        elif before == "the model":
            remedy = "; leave it out, or start from a torch module"
        else:
            remedy = f"; move '{step.key}' before it"
        gives = "is" if before == "the model" else "gives"
        problems.append(
            f"step '{step.key}' takes {spoken(step.info.takes)}, but {before} {gives} {spoken(forms)}{remedy}"
        )
    return step.gives(forms)


def budget_problems(
    entries: Sequence[Entry],
    budget: Budget,
    measure: Measure,
    relax: dict[str, list[Step]],
    runtime: str,
    form: str = "torch",
) -> list[str]:
    """Limits that contradict one another, the pipeline or how it is measured.

    form: of the model that comes in.
    """
    previewed = {"torch", "program"} - set(RUNTIMES[runtime])  # measured as a file exported for that purpose
    after = {entry.key: forms for entry, _, forms in forms_along(entries, form)}
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
        if not measure.previews and after[key] & previewed and set(limits.limits()) - {"quality_drop"}:
            problems.append(f"{where} limits what measure.previews=false leaves unmeasured; set measure.previews=true")
    if timed := [name for name in budget.limits() if name not in OF_ANY_FORM]:
        last = forms_along(entries, form)[-1][2]
        if last & previewed:
            problems.append(
                f"budget.{timed[0]} limits what is measured on the target, but the pipeline ends with {spoken(last)}, "
                "which it does not run; end the pipeline with an export"
            )
    for entry in entries:
        if isinstance(entry, Choice) and entry.how == "best_of" and after[entry.key] & previewed:
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


def forms_along(entries: Sequence[Entry], form: str = "torch") -> list[tuple[Entry, frozenset[str], frozenset[str]]]:
    """Each entry with the forms that a model may have before and after it, for a chain without problems."""
    along, forms = [], frozenset({form})
    for entry in entries:
        branches = [(entry,)] if isinstance(entry, Step) else entry.branches
        after = frozenset().union(
            *(functools.reduce(lambda given, step: step.gives(given), b, forms) for b in branches)
        )
        along.append((entry, forms, after))
        forms = after
    return along

"""The rehearsal: the chain once, on two batches of data, before the first stage that takes long.

What would fail after an hour of training fails now, and every step gets a predicted time and peak memory. Nothing is
judged, timed or kept: the quality of a model after one step of training says nothing.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from optpipe import parity
from optpipe.artifact import Artifact
from optpipe.budget import Policy
from optpipe.checkpoint import random_state, set_random_state
from optpipe.context import Context
from optpipe.errors import OptpipeError, StageError
from optpipe.machine import machine_lock, usable_cores
from optpipe.measure.measurer import Measurer
from optpipe.measure.memory import peak_memory, resident_bytes
from optpipe.plan import Choice, Plan, Step, forms_along, steps_of
from optpipe.predictions import Predictions
from optpipe.progress import log, say
from optpipe.report import NotMeasured, StageResult, figures
from optpipe.report.schema import NOT_REHEARSED
from optpipe.schedule import Schedule
from optpipe.task import SPLITS, Batches, Inputs, Split, Task, batch_of, call, size_of, tensors_in

FOLDER = "00_rehearsal"
BATCHES = 2  # of every split
EPOCHS = 2  # of one step of training each: the first pays what is paid once, the second is timed
SHOWN_SECONDS = 1.0  # steps that are predicted to take less are not listed


@dataclass(frozen=True)
class Forecast:
    """What one step is predicted to take."""

    seconds: float | NotMeasured = NOT_REHEARSED
    peak_memory_bytes: int | NotMeasured = NOT_REHEARSED


Forecasts = dict[tuple[str, str], Forecast]  # by a step's key, and its settings where `relax` varies them


@dataclass
class Cut:
    """The first batches of a split, read once, and how long each reader kept the last of them."""

    batches: list[Any]
    count: int | None  # of the whole split; None where it does not say
    read_seconds: float  # of one batch
    kept: list[float] = field(default_factory=list)  # by the readers that asked for more

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[:-1]
        begin = time.perf_counter()
        yield self.batches[-1]
        self.kept.append(time.perf_counter() - begin)

    def __len__(self) -> int:
        return len(self.batches)

    def rest_seconds(self) -> float:
        """What the other batches would have taken those readers; `count` must be known."""
        assert self.count is not None
        return max(0, self.count - len(self)) * sum(seconds + self.read_seconds for seconds in self.kept)


class Unjudged(Task):
    """A task on which every model is equally good, whatever it returns."""

    def _batch(self, model: Callable[..., Any], inputs: Inputs, target: Any, split: Split) -> Predictions:
        with torch.no_grad():
            self.selected(call(model, inputs))
        return Predictions(metric=self.metric, n=size_of(inputs), scores=np.ones(size_of(inputs)))


class Untimed(Context):
    """A context in which nothing is timed."""

    def _can_time(self) -> bool:
        return False


class Rehearsal:
    """One rehearsal of a plan. The model, the random state and the number of threads are left as they were.

    measurer: the run's, of which only the engines are used.
    """

    def __init__(self, plan: Plan, task: Task, folder: Path, measurer: Measurer) -> None:
        self.plan, self.whole, self.folder, self.measurer = plan, task, folder / FOLDER, measurer
        self.forecasts: Forecasts = {}
        self.number = 0
        self.failed: StageResult | None = None  # the step that ended the rehearsal

    def run(self, baseline: Artifact, before: Artifact, done: int = 0) -> Forecasts:
        """Take `before` through the plan behind its first `done` entries, which made it of `baseline`.

        Raises StageError for the step that fails; its folder then stays.
        """
        begin, entries = time.perf_counter(), self.plan.entries[done:]
        say(f"rehearsal: {len(entries)} steps on {BATCHES} batches …")
        self.folder.mkdir(exist_ok=True)
        with _state_kept(self.whole), machine_lock().working():
            self.cuts = {split: _cut(getattr(self.whole, split)) for split in SPLITS}
            self.task = _unjudged(self.whole, self.cuts)
            self.baseline = baseline.form.load(baseline.folder)
            if isinstance(self.baseline, nn.Module):
                self.baseline.requires_grad_(False)
            state = before
            for number, entry in enumerate(entries, done + 1):
                self.number = number
                state = self._choose(entry, state) if isinstance(entry, Choice) else self._step(entry, state)
        shutil.rmtree(self.folder)
        self._add_resident()
        say(self._summary(len(steps_of(entries)), time.perf_counter() - begin))
        return self.forecasts

    def _add_resident(self) -> None:
        """Predict each peak from what the step added, and what the process holds now that everything is imported."""
        resident = resident_bytes()
        for key, found in self.forecasts.items():
            if not (isinstance(resident, NotMeasured) or isinstance(found.peak_memory_bytes, NotMeasured)):
                self.forecasts[key] = replace(found, peak_memory_bytes=resident + found.peak_memory_bytes)

    def _step(self, step: Step, before: Artifact) -> Artifact:
        """One stage, its model saved and loaded, and a look at what it computes."""
        folder = self.folder / f"{self.number}_{step.key}"
        folder.mkdir()
        try:
            return self._run(step, before, folder)
        except OptpipeError as error:
            self._note(error, step, before, folder)
            raise
        except Exception as error:
            log.exception("stage '%s' raised", step.key)
            raised = StageError(f"stage '{step.info.name}' raised {type(error).__name__}: {error}")
            self._note(raised, step, before, folder)
            raise raised from error

    def _note(self, error: OptpipeError, step: Step, before: Artifact, folder: Path) -> None:
        """Add to `error` where it happened, and keep it as the result of `step`."""
        self.failed = StageResult(
            key=step.key, stage=step.info.name, status="failed", seconds=0.0, form=before.form.NAME,
            measurement=NotMeasured("the stage failed in the rehearsal"), notes=[f"in the rehearsal: {error}"],
        )  # fmt: skip
        error.add_note(
            f"in the rehearsal, before anything was trained or measured: step {self.number} of "
            f"{len(self.plan.entries)}, '{step.key}', in {folder}"
        )
        error.add_note(
            f"if {BATCHES} batches are too few for it and nothing else is wrong, rehearse=false does without"
        )

    def _run(self, step: Step, before: Artifact, folder: Path) -> Artifact:
        facts: dict[str, Any] = {}
        seed = self.plan.seed_of(step.key)
        torch.manual_seed(seed)
        torch.set_num_threads(usable_cores())
        ctx = Untimed(
            dir=folder, task=self.task, target=self.plan.target, baseline=self.baseline, device=self.plan.device,
            seed=seed, measurer=self.measurer, facts=facts,
        )  # fmt: skip
        for cut in self.cuts.values():
            cut.kept.clear()
        with before.lent() as model:
            begin = time.perf_counter()
            with peak_memory() as peak:
                model = _shortened(step.stage).run(model, ctx)
            seconds = self._seconds(step.stage, time.perf_counter() - begin, facts)
            self.forecasts[step.key, step.settings] = Forecast(seconds, peak.growth_bytes)
            step.form_after(before.form.NAME, model)
            after = Artifact.save(model, folder)
        if after.form is not before.form:
            self._compare(before.model, after.model)
        return after

    def _seconds(self, stage: Any, rehearsed: float, facts: dict[str, Any]) -> float | NotMeasured:
        """`rehearsed`, and for each batch that was left out as much as the last one took."""
        read = {split: cut for split, cut in self.cuts.items() if cut.kept}
        if unknown := [split for split, cut in read.items() if cut.count is None]:
            return NotMeasured(f"the {unknown[0]} split does not say how many batches it holds")
        if not isinstance(stage, Schedule):
            return rehearsed + sum(cut.rest_seconds() for cut in read.values())
        epochs, train = facts.get("epoch_seconds"), self.cuts["train"]
        if not epochs or train.count is None:
            return NotMeasured("the stage records no epoch_seconds")
        steps = stage.epochs * train.count * (1 - float(getattr(stage, "held_out", 0.0))) - len(epochs)
        others = sum(cut.rest_seconds() for split, cut in read.items() if split != "train")
        return rehearsed + others + max(0.0, steps) * (float(epochs[-1]) + train.read_seconds)

    def _compare(self, reference: Any, model: Any) -> None:
        """Raises StageError if `model` cannot be run, or returns other shapes than `reference`, or other numbers.

        Numbers only in float32: what rounding does to a model that has hardly been trained says nothing.
        """
        precision = parity.precision(reference)
        with self.measurer.evaluating(reference) as expected, self.measurer.evaluating(model) as found:
            if precision == "float32":
                parity.check(expected, found, self.task, precision=precision)
                return
            inputs, _ = next(iter(self.task.validation))
            for batch in [*(batch_of(inputs, size) for size in parity.BATCH_SIZES), inputs]:
                with torch.no_grad():
                    shapes = [
                        [tuple(tensor.shape) for tensor in tensors_in(self.task.selected(call(run, batch)))]
                        for run in (expected, found)
                    ]
                if shapes[0] != shapes[1]:
                    raise StageError(f"the outputs had shapes {shapes[0]} before this step and {shapes[1]} after it")

    def _choose(self, choice: Choice, before: Artifact) -> Artifact:
        """Every branch; the chain goes on from the first that works."""
        worked: list[Artifact] = []
        reasons: list[str] = []
        for branch in choice.branches:
            state = before
            try:
                for step in branch:
                    state = self._step(step, state)
                worked.append(state)
            except StageError as error:
                reasons.append(f"'{'+'.join(step.key for step in branch)}': {error}")
        keeps_form = forms_along([choice], before.form.NAME)[0][2] == {before.form.NAME}
        rolls_back = self.plan.budget.policy in (Policy.rollback, Policy.relax)
        if worked or (keeps_form and (choice.how == "best_of" or rolls_back)):
            self.failed = None
            return (worked or [before])[0]
        raise StageError(f"in the rehearsal, no alternative of {choice.how} worked: {'; '.join(reasons)}")

    def _summary(self, count: int, seconds: float) -> str:
        """As in "rehearsed 7 steps in 6.1 s; predicted: distill 24.0 s and 0.9 GB; …"."""
        known = {key: found for (key, _), found in self.forecasts.items() if isinstance(found.seconds, float)}
        longest = sorted(known, key=lambda key: -known[key].seconds)  # type: ignore[operator]
        shown = [key for key in longest if known[key].seconds >= SHOWN_SECONDS]  # type: ignore[operator]
        parts = [f"{key} {_said(known[key])}" for key in shown]
        rest = sum(known[key].seconds for key in longest if key not in shown)  # type: ignore[misc]
        parts += [f"the others {figures.seconds(rest)} together"] if rest else []
        unknown = [key for (key, _) in self.forecasts if key not in known]
        parts += [f"{', '.join(unknown)} unknown"] if unknown else []
        return f"  rehearsed {count} steps in {figures.seconds(seconds)}; predicted: {'; '.join(parts)}"


def _said(forecast: Forecast) -> str:
    assert isinstance(forecast.seconds, float)
    memory = forecast.peak_memory_bytes
    return figures.seconds(forecast.seconds) + ("" if isinstance(memory, NotMeasured) else f", {figures.size(memory)}")


def _shortened(stage: Any) -> Any:
    """`stage` with as many epochs as a rehearsal has, and no checkpoint of the user's."""
    if not isinstance(stage, Schedule):
        return stage
    short = copy.copy(stage)  # not made anew: its other settings may only fit the epochs that were asked for
    short.epochs = min(stage.epochs, EPOCHS)
    if hasattr(short, "checkpoint"):
        short.checkpoint = None
    return short


def _cut(split: Batches) -> Cut:
    """The first batches of `split`; the last is read twice as often as the first, whose reading starts what reads."""
    reader = iter(split)
    batches = list(islice(reader, BATCHES - 1))
    begin = time.perf_counter()
    batches += list(islice(reader, 1))
    seconds = time.perf_counter() - begin
    if isinstance(split, DataLoader) and len(batches) == 1:
        batches *= BATCHES  # a stage that holds out training data splits it by samples
    try:
        count = len(split)  # type: ignore[arg-type]
    except TypeError:
        count = None
    return Cut(batches, count, seconds)


def _unjudged(task: Task, cuts: dict[Split, Cut]) -> Task:
    settings: dict[str, Any] = {item.name: getattr(task, item.name) for item in fields(Task)}
    settings.update(cuts, slices={})  # type: ignore[arg-type]
    return Unjudged(**settings)


@contextmanager
def _state_kept(task: Task) -> Iterator[None]:
    """Put back what draws and computes, so that a run comes out the same with and without a rehearsal."""
    own = [getattr(getattr(task, split), "generator", None) for split in SPLITS]
    generators = [(one, one.get_state()) for one in own if isinstance(one, torch.Generator)]
    state, threads = random_state(), torch.get_num_threads()
    try:
        yield
    finally:
        set_random_state(state)
        torch.set_num_threads(threads)
        for generator, before in generators:
            generator.set_state(before)

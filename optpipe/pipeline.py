"""The loop. For every step: look up, or run → save and load back → parity; then measure → record → judge."""

from __future__ import annotations

import functools
import itertools
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from optpipe import alternatives, manifest, parity
from optpipe.alternatives import Branch
from optpipe.artifact import Artifact
from optpipe.budget import Policy
from optpipe.contest import Entrant
from optpipe.context import Benchmarks, Context
from optpipe.divergence import first_divergence
from optpipe.errors import OptpipeError, OverBudget, StageError
from optpipe.fingerprint import environment
from optpipe.forms import SPOKEN, ExportedFile
from optpipe.judge import Judge
from optpipe.machine import machine_lock, usable_cores
from optpipe.measure.latency import Bench
from optpipe.measure.measurer import Measurer
from optpipe.measure.memory import peak_memory
from optpipe.plan import Choice, Entry, Plan, Step, forms_along, method_of, spoken, steps_of
from optpipe.progress import log, say
from optpipe.rehearsal import Forecast, Forecasts, Rehearsal
from optpipe.report import Attempt, BudgetReport, Final, NotMeasured, Report, StageResult
from optpipe.report.page import write_page
from optpipe.reuse import Outcome, Place, Reuse
from optpipe.runtimes import engine_of
from optpipe.schedule import Schedule
from optpipe.state import State
from optpipe.store import Key, open_store
from optpipe.task import Inputs, Task
from optpipe.tracking import Tracker

FULL_DISK_BYTES = 2**20


def run(
    plan: Plan, model: Any, task: Task, folder: Path, tracker: Tracker, started: float, model_seconds: float
) -> Report:
    """Take `model` through `plan` and leave report.json and model/ in `folder`.

    started: time.perf_counter() when this run began, before imports and composition.
    model_seconds: of the time since, what making the model and the task took.
    Raises StageError for the step that failed; report and tracking are finished before.
    """
    report = Report(
        recipe=plan.recipe,
        overrides=plan.overrides,
        environment=environment(),
        command=plan.command,
        data_fingerprint=task.fingerprint or "",
        model_seconds=model_seconds,
        budget=BudgetReport(
            limits=plan.budget.limits(), policy=plan.budget.policy.value, confidence=plan.budget.confidence
        ),
    )
    report.mlflow_run_id = tracker.start({"recipe": plan.recipe, **plan.config}, folder)
    with Bench(plan.measure, folder / "00_baseline" / "workers") as bench:
        loop = Loop(plan, model, task, folder, tracker, bench, report)
        try:
            loop.run()
        except BaseException as error:
            report.error = str(error) or type(error).__name__
            raise
        finally:
            loop.measurer.close()
            report.seconds = time.perf_counter() - started
            report.measuring_seconds = loop.measurer.seconds
            own = sum(stage.seconds for stage in report.stages)
            known = report.model_seconds + report.rehearsal_seconds + report.measuring_seconds + own
            known += loop.given_up_seconds
            report.overhead_seconds = report.seconds - known
            _write(report, folder)
            tracker.finish(report, folder)
            loop.reuse.store.close()
    return report


def _write(report: Report, folder: Path) -> None:
    """Write report.json and its page; on a full disk say so, and let the error that ended the run be the one shown."""
    try:
        report.write(folder)
        write_page(report, folder)
    except OSError as error:
        say(f"the report could not be written to {folder}: {error}")


class Loop:
    """One run of a plan."""

    def __init__(
        self, plan: Plan, model: Any, task: Task, folder: Path, tracker: Tracker, bench: Bench, report: Report
    ) -> None:
        self.plan, self.task, self.folder, self.tracker, self.report = plan, task, folder, tracker, report
        baseline_folder = folder / "00_baseline"
        baseline_folder.mkdir(parents=True, exist_ok=True)
        self.reuse = Reuse(open_store(plan.store), plan, task, folder)
        self.measurer = Measurer(task, plan.target, plan.measure, folder, bench, self.reuse)
        self.judge = Judge(plan.budget, self.measurer)
        self.baseline = model
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(True)  # in the saved copy, which a rolled-back run trains
        self.number = 0
        self.states: list[State] = []  # before each entry that is done, and the current one; the past have no models
        self.tries: dict[str, list[Attempt]] = {}  # by step, of the settings that `relax` lists
        self.given_up_seconds = 0.0  # stages' own work whose results the report does not hold
        self.broken: list[str] = []  # limits of single steps that nothing could be done about
        self.forecasts: Forecasts = {}

    def run(self) -> None:
        """The whole control flow of the product."""
        baseline = Artifact.save(self.baseline, self.folder / "00_baseline")
        self.reuse.begin(baseline.hash, self.baseline)
        if self.plan.is_rehearsed:
            self._rehearse(baseline)
        self.states = [self._measure_baseline(baseline)]
        while len(self.states) <= len(self.plan.entries):
            self.number = len(self.states)
            entry, before = self.plan.entries[self.number - 1], self.states[-1]
            if isinstance(entry, Choice):
                after = self._choose(entry, before)
            else:
                after = self._step(self._as_relaxed(entry), before, self._dir(entry))
            self.states[-1:] = [before.unloaded(), after]
            self._judge(entry)
        self._finish(self.states[-1])

    def _rehearse(self, baseline: Artifact) -> None:
        """What the store does not hold, unless nothing in it trains or the same was rehearsed before; all, if asked."""
        rehearsal, begin = Rehearsal(self.plan, self.task, self.folder, self.measurer), time.perf_counter()
        is_asked = self.plan.rehearse is not None
        done, last = (0, None) if is_asked else self.reuse.reached(Place(baseline.form.NAME, baseline.hash))
        if not is_asked and not any(isinstance(step.stage, Schedule) for step in steps_of(self.plan.entries[done:])):
            return
        key, kind = self.reuse.rehearsal(done), self.reuse.rehearsal_of_kind(done)
        try:
            with self.reuse.alone(key):
                if not is_asked and (known := self.reuse.forecasts(key)) is not None:
                    self.forecasts = known
                    return
                if not is_asked and self.reuse.is_rehearsed(kind):
                    say(
                        "rehearsal: none, these stages were rehearsed before, set to other numbers (rehearse=true asks)"
                    )
                    return
                before = self.reuse.model(last, rehearsal.folder / "before") if last else None
                self.forecasts = rehearsal.run(baseline, before or baseline, done if before else 0)
                self.reuse.keep_forecasts(key, self.forecasts)
                for later in range(done, len(self.plan.entries)):  # what stands behind more of them was rehearsed too
                    self.reuse.keep_forecasts(self.reuse.rehearsal_of_kind(later), {})
        except OptpipeError:
            if rehearsal.failed:
                self.report.stages.append(rehearsal.failed)
                self.tracker.stage(rehearsal.failed)
            raise
        finally:
            self.report.rehearsal_seconds = time.perf_counter() - begin

    def _measure_baseline(self, baseline: Artifact) -> State:
        say("[0] baseline …")
        measurement = self.measurer.baseline(baseline)
        self.report.baseline = measurement
        self.tracker.baseline(measurement)
        if isinstance(self.baseline, nn.Module):
            self.baseline.requires_grad_(False)
        self.judge.baseline = baseline.hash, measurement
        return State(baseline, measurement, results=0)

    def _as_relaxed(self, step: Step) -> Step:
        """`step` with the settings that are to be tried now."""
        failed = len(self.tries.get(step.key, []))
        return self.plan.relax[step.key][failed - 1] if failed else step

    def _judge(self, entry: Entry) -> None:
        """Judge the current state by the limits on `entry` and the run's on quality; act where one is broken."""
        budget, state = self.plan.budget, self.states[-1]
        limits = budget.of_step(entry.key)
        waits = isinstance(entry, Step) and entry.info.needs_recovery and self.number < len(self.plan.entries)
        if budget.quality_drop is not None and not waits:
            limits.setdefault("quality_drop", budget.quality_drop)
            limits["quality_drop"] = min(limits["quality_drop"], budget.quality_drop)
        checks = self.judge.checks(limits, state, entry.key)
        self.report.budget.checks += checks
        broken = [check for check in checks if not check.holds]
        if not broken:
            self.states[-1] = replace(state, is_accepted=not waits)
            return
        said = "; ".join(check.said for check in broken)
        if budget.policy is Policy.stop:
            self.report.status, self.report.budget.violations = "over_budget", [f"after '{entry.key}', {said}"]
            raise OverBudget(f"over budget after step '{entry.key}', and budget.policy is stop: {said}")
        if budget.policy is Policy.relax and self._relax(said):
            return
        if budget.policy in (Policy.rollback, Policy.relax) and self._roll_back(said):
            return
        own = budget.of_step(entry.key)
        self.broken += [f"after '{entry.key}', {check.said}" for check in broken if check.limit in own]
        say(f"  over budget: {said}")

    def _relax(self, said: str) -> bool:
        """Go back to the nearest step that has milder settings left; False if none has."""
        for index in range(self.number - 1, -1, -1):
            entry = self.plan.entries[index]
            tries = self.tries.get(entry.key, [])
            if not isinstance(entry, Step) or len(tries) >= len(self.plan.relax.get(entry.key, [])):
                continue
            settings = self._as_relaxed(entry).settings
            self.tries[entry.key] = [*tries, Attempt(method=settings, ok=False, reason=said)]
            milder = self.plan.relax[entry.key][len(tries)].settings
            say(f"  over budget: {said}; trying '{entry.key}' again with {milder}")
            for result in self.report.stages[self.states[index].results :]:
                self.tracker.rolled_back(result)
                self.given_up_seconds += result.seconds
            del self.report.stages[self.states[index].results :]
            del self.states[index + 1 :]
            return True
        return False

    def _roll_back(self, said: str) -> bool:
        """Go on from the last accepted model; False if the next step could not take its form."""
        index = next(i for i in range(len(self.states) - 2, -1, -1) if self.states[i].is_accepted)
        accepted = self.states[index]
        if accepted.artifact.form is not self.states[-1].artifact.form:
            say(f"  '{self.plan.entries[self.number - 1].key}' changed the model's form and cannot be rolled back")
            return False
        dropped = self.report.stages[accepted.results :]
        for result in dropped:
            result.status = "rolled_back"
            result.notes.append(f"rolled back: {said}")
            self.tracker.rolled_back(result)
        names = ", ".join(f"'{result.key}'" for result in dropped)
        say(f"  over budget: {said}; rolled back {names}")
        past = replace(accepted, results=len(self.report.stages))
        self.states[index + 1 :] = [past] * (len(self.states) - index - 1)
        return True

    def _step(self, step: Step, before: State, folder: Path) -> State:
        """One stage with everything around it; its result is in the report whatever happens."""
        say(f"[{self.number}/{len(self.plan.entries)}] {step.key} ({step.info.name}) …")
        folder.mkdir(parents=True)
        forecast = self.forecasts.get((step.key, step.settings), Forecast())
        result = StageResult(
            key=step.key, stage=step.info.name, status="failed", seconds=0.0, form=before.artifact.form.NAME,
            measurement=NotMeasured("the stage failed"), attempts=list(self.tries.get(step.key, [])),
            predicted_seconds=forecast.seconds, predicted_peak_memory_bytes=forecast.peak_memory_bytes,
        )  # fmt: skip
        self.report.stages.append(result)
        try:
            after = self._run_and_measure(step, before, folder, result)
        except OptpipeError as error:
            error.add_note(self._place(step, folder))
            result.notes.append(str(error))
            raise
        except Exception as error:
            log.exception("stage '%s' raised", step.key)
            result.notes.append(f"{type(error).__name__}: {error}")
            raised = StageError(f"stage '{step.info.name}' raised {type(error).__name__}: {error}")
            raised.add_note(self._place(step, folder))
            if shutil.disk_usage(folder).free < FULL_DISK_BYTES:  # torch then raises errors that do not say so
                raised.add_note("the disk of that folder is full; free space, or choose another with hydra.run.dir=…")
            raise raised from error
        except KeyboardInterrupt:
            result.notes.append("interrupted")
            raise
        finally:
            self.tracker.stage(result)
        return after

    def _run_and_measure(self, step: Step, before: State, folder: Path, result: StageResult) -> State:
        given, found = before.artifact, self._outcome(step, before, folder, result)
        artifact, benchmarks = found.artifact, found.benchmarks
        result.form, result.model_sha256 = artifact.form.NAME, artifact.hash
        unchanged = artifact.hash == given.hash
        engine = before.engine if artifact.form is given.form else ""
        measurement = before.measurement if unchanged else self.measurer.measure(artifact, engine, explain=True)
        result.measurement = benchmarks.added_to(measurement)
        result.status = "unchanged" if unchanged and not benchmarks else "ok"
        return State(artifact, result.measurement, len(self.report.stages), benchmarks.engine or engine)

    def _outcome(self, step: Step, before: State, folder: Path, result: StageResult) -> Outcome:
        """What the stage gives: taken from the store, or computed and kept there, by one process at a time."""
        key, tries = self.reuse.step(step, before.place), len(result.attempts)
        with self.reuse.alone(key):
            begin = time.perf_counter()
            if found := self.reuse.take(key, folder, result):
                result.seconds = time.perf_counter() - begin
            else:
                found = self._run(step, before, folder, result, key)
                self.reuse.keep(key, folder, result, found, tries)
        return found

    def _run(self, step: Step, before: State, folder: Path, result: StageResult, key: Key | None) -> Outcome:
        given, ctx = before.artifact, self._context(step, before, folder, result, self.reuse.partial(key))
        with given.lent() as model:
            begin, measured = time.perf_counter(), self.measurer.seconds
            try:
                with machine_lock().working(), peak_memory() as peak:
                    model = step.stage.run(model, ctx)
                result.peak_memory_bytes = peak.bytes
            finally:
                result.seconds = time.perf_counter() - begin - (self.measurer.seconds - measured)
            step.form_after(given.form.NAME, model)
            artifact = Artifact.save(model, folder)
        if artifact.form is not given.form:
            precision = parity.coarsest(parity.precision(given.model), *ctx.precisions)
            result.notes.append(self._parity(given.model, artifact.model, precision).note())
        return Outcome(artifact, ctx.benchmarks)

    def _parity(self, before: Any, after: Any, precision: str) -> parity.Parity:
        def locate(inputs: Inputs, tolerance: float) -> str:
            if isinstance(before, ExportedProgram) and isinstance(after, ExportedFile) and after.format == "onnx":
                return first_divergence(before, after, inputs, tolerance)
            return ""

        with self.measurer.evaluating(before) as expected, self.measurer.evaluating(after) as found:
            return parity.check(expected, found, self.task, precision=precision, locate=locate)

    def _context(self, step: Step, before: State, folder: Path, result: StageResult, partial: Path | None) -> Context:
        seed = self.plan.seed_of(step.key)
        torch.manual_seed(seed)
        torch.set_num_threads(usable_cores())
        return Context(
            dir=folder,
            task=self.task,
            target=self.plan.target,
            baseline=self.baseline,
            device=self.plan.device,
            seed=seed,
            measurer=self.measurer,
            facts=result.facts,
            notes=result.notes,
            tables=result.tables,
            attempts=result.attempts,
            benchmarks=Benchmarks(),
            engine=before.engine,
            choose_engine=functools.partial(alternatives.choose_engine, step.key, folder, result, self.judge),
            partial=partial,
        )

    def _choose(self, choice: Choice, before: State) -> State:
        """The first branch that runs inside the budget, or the best of all that do and of the model before them.

        A limit on anything but quality may be broken: later steps may still make it hold, and the run's end says
        whether they did. Such a branch is taken where no other holds the limit.
        """
        folder, kept = self._dir(choice), len(self.report.stages)
        current = before.artifact.form.NAME
        keeps_form = forms_along([choice], current)[0][2] == {current}
        competes = choice.how == "best_of" and keeps_form
        original = self.judge.entrant(choice.key, self._as_entrant(before)) if competes else None
        branches: list[Branch] = []
        for number, steps in enumerate(choice.branches, 1):
            branch = self._branch(choice, steps, before, original, [folder / f"{number}_{step.key}" for step in steps])
            del self.report.stages[kept:]
            branches.append(branch)
            if choice.how == "first_of" and branch.entrant and not (branch.refused or branch.entrant.broken):
                break
        chosen = alternatives.chosen(choice.how, branches, self.plan.measure.margin)
        attempts = [branch.attempt(branch is chosen) for branch in branches]
        attempts += [Attempt(method=method, ok=False, reason=reason) for method, reason in choice.absent]
        if chosen is None and original is None:
            return self._no_alternative(choice, before, branches, attempts, keeps_form)
        for result in (result for branch in branches if branch is not chosen for result in branch.results):
            self.given_up_seconds += result.seconds
            if result.status != "failed":
                self.tracker.rolled_back(result)
        if chosen is None:
            assert original is not None
            return self._unchanged(choice, before, original, attempts)
        assert chosen.state is not None and chosen.entrant is not None
        if original:
            chosen.results[0].notes.append(f"chosen by {choice.how}; the model before it: {original.said()}")
        say(f"  {choice.how}: '{chosen.method}', {chosen.entrant.said()}")
        chosen.results[0].attempts = attempts + chosen.results[0].attempts
        self.report.stages.extend(chosen.results)
        return replace(chosen.state, results=len(self.report.stages))

    def _branch(
        self, choice: Choice, steps: tuple[Step, ...], before: State, original: Entrant | None, folders: list[Path]
    ) -> Branch:
        """One branch of `choice`, run on a model of its own; its results are left at the end of the report's."""
        first, branch = len(self.report.stages), Branch(method_of(steps))
        state = before
        try:
            for step, folder in zip(steps, folders, strict=True):
                state = self._step(step, state, folder)
            is_same = original and state.artifact.hash == before.artifact.hash
            entrant = original if original and is_same else self.judge.entrant(choice.key, state)
            branch.state, branch.entrant = state, entrant
            branch.refused = alternatives.refusal(self.judge, entrant, state, original, before)
        except StageError as error:
            branch.refused = str(error)
        branch.results = self.report.stages[first:]
        return branch

    def _as_entrant(self, before: State) -> State:
        """`before`, measured as its branches are: the model as it came in, too, in the target's runtime."""
        if before.artifact.hash != self.states[0].artifact.hash:
            return before
        say("  the model before the alternatives …")
        return replace(before, measurement=self.measurer.measure(before.artifact))

    def _unchanged(self, choice: Choice, before: State, original: Entrant, attempts: list[Attempt]) -> State:
        """Nothing is better than the model before the choice: it goes on."""
        said = f"no alternative of {choice.how} is better than the model before it, which goes on: {original.said()}"
        say(f"  {said}")
        result = StageResult(
            key=choice.key, stage=choice.how, status="unchanged", seconds=0.0, form=before.artifact.form.NAME,
            measurement=before.measurement, attempts=attempts, notes=[said],
        )  # fmt: skip
        self.report.stages.append(result)
        self.tracker.stage(result)
        return replace(before, results=len(self.report.stages))

    def _no_alternative(
        self, choice: Choice, before: State, branches: list[Branch], attempts: list[Attempt], keeps_form: bool
    ) -> State:
        """Every branch failed or broke its limits: the model before them, where the policy takes steps back."""
        reasons = "; ".join(f"'{attempt.method}': {attempt.reason}" for attempt in attempts)
        said = f"no alternative of {choice.how} worked: {reasons}"
        tried = [result for branch in branches for result in branch.results]
        for result in tried:
            result.status = "failed" if result.status == "failed" else "rolled_back"
            self.tracker.rolled_back(result)
        tried[0].attempts = attempts
        self.report.stages.extend(tried)
        if self.plan.budget.policy in (Policy.rollback, Policy.relax) and keeps_form:
            say(f"  {said}; rolled back")
            return replace(before, results=len(self.report.stages))
        if not keeps_form:
            current = before.artifact.form.NAME
            after = forms_along([choice], current)[0][2]
            said += (
                f"; the model before them cannot go on in their place, since they turn {SPOKEN[current]} into "
                f"{spoken(after)}: choose among steps that keep the form, and trace and export after them"
            )
        raise StageError(said)

    def _finish(self, state: State) -> None:
        form = state.artifact.form
        engine = state.engine or engine_of(form.NAME, self.plan.target.runtime)
        folder = manifest.deploy(state.artifact.model, form.NAME, self.folder, self.plan.target, engine, self.task)
        deployed = replace(state.artifact, folder=folder)
        measurement = self.measurer.final(state.measurement, deployed, engine)
        drop = self.judge.drop(replace(state, measurement=measurement))
        self.report.final = Final(
            artifact=f"{manifest.FOLDER}/{form.files(folder)[0].name}",
            measurement=measurement,
            quality_drop=drop.value,
            quality_drop_ci95=drop.ci95,
        )
        self.measurer.save_quality(deployed, engine)
        checks = self.judge.checks(self.plan.budget.limits(), replace(state, measurement=measurement), "run")
        self.report.budget.checks += checks
        self.report.budget.violations = self.broken + [check.said for check in checks if not check.holds]
        for result in self.report.stages:
            if result.key in self.tries:
                settings = self.plan.relax[result.key][len(self.tries[result.key]) - 1].settings
                problems = result.notes[-1:] if result.status == "rolled_back" else self.report.budget.violations
                reason = "; ".join(problems) or "inside the budget"
                result.attempts.append(Attempt(method=settings, ok=not problems, reason=reason))
        self.report.status = "over_budget" if self.report.budget.violations else "ok"

    def _dir(self, entry: Entry) -> Path:
        """A folder of its own for each time that an entry is run."""
        name = entry.key if isinstance(entry, Step) else entry.how  # a choice's key holds those of all its branches
        first = self.folder / f"{self.number:02d}_{name}"
        tries = (first.with_name(f"{first.name}_try{number}") for number in itertools.count(2))
        return next(folder for folder in itertools.chain([first], tries) if not folder.exists())

    def _place(self, step: Step, folder: Path) -> str:
        return f"while running step {self.number} of {len(self.plan.entries)}, '{step.key}', in {folder}"

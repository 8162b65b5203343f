"""The loop. For every step: run → save and load back → parity → measure → record; then the budget."""

from __future__ import annotations

import copy
import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optpipe import manifest, parity
from optpipe.context import Context
from optpipe.errors import OptpipeError, StageError
from optpipe.forms import Form, form, form_of
from optpipe.machine import environment, machine_lock, usable_cores
from optpipe.measure.latency import Bench
from optpipe.measure.measurer import Measurer
from optpipe.plan import Choice, Entry, Plan, Step
from optpipe.progress import log, say
from optpipe.report import Attempt, BudgetReport, Final, Measurement, NotMeasured, Report, StageResult
from optpipe.report.page import write_page
from optpipe.task import Task
from optpipe.tracking import Tracker

FULL_DISK_BYTES = 2**20


@dataclass(frozen=True)
class State:
    """The model between two steps."""

    model: Any
    form: Form
    folder: Path  # where it was saved
    hash: str
    measurement: Measurement

    def reloaded(self) -> State:
        """The same with a model of its own, for a branch that may change it."""
        return replace(self, model=self.form.load(self.folder))


def run(
    plan: Plan, model: nn.Module, task: Task, folder: Path, tracker: Tracker, started: float, model_seconds: float
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
        budget=BudgetReport(limits=plan.budget.limits(), policy=plan.budget.policy.value),
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
            report.seconds = time.perf_counter() - started
            report.measuring_seconds = loop.measurer.seconds
            known = report.model_seconds + report.measuring_seconds + sum(stage.seconds for stage in report.stages)
            report.overhead_seconds = report.seconds - known
            _write(report, folder)
            tracker.finish(report, folder)
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
        self, plan: Plan, model: nn.Module, task: Task, folder: Path, tracker: Tracker, bench: Bench, report: Report
    ) -> None:
        self.plan, self.task, self.folder, self.tracker, self.report = plan, task, folder, tracker, report
        baseline_folder = folder / "00_baseline"
        baseline_folder.mkdir(parents=True, exist_ok=True)
        self.measurer = Measurer(task, plan.target, plan.measure, folder, bench)
        self.baseline = model.eval().requires_grad_(False)
        self.number = 0

    def run(self) -> None:
        """The whole control flow of the product."""
        state = self._measure_baseline()
        for number, entry in enumerate(self.plan.entries, 1):
            self.number = number
            if isinstance(entry, Choice):
                state = self._choose(entry, state)
            else:
                state = self._step(entry, state, self._dir(entry))
        self._finish(state)

    def _measure_baseline(self) -> State:
        say("[0] baseline …")
        measurement = self.measurer.baseline(self.baseline)
        self.report.baseline = measurement
        self.tracker.baseline(measurement)
        model = copy.deepcopy(self.baseline).requires_grad_(True)
        return State(model, form("torch"), self.folder / "00_baseline", form("torch").content_hash(model), measurement)

    def _step(self, step: Step, before: State, folder: Path) -> State:
        """One stage with everything around it; its result is in the report whatever happens."""
        say(f"[{self.number}/{len(self.plan.entries)}] {step.key} ({step.info.name}) …")
        folder.mkdir(parents=True)
        result = StageResult(
            key=step.key, stage=step.info.name, status="failed", seconds=0.0, form=before.form.NAME,
            measurement=NotMeasured("the stage failed"),
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
        ctx = self._context(step, folder, result)
        begin, measured = time.perf_counter(), self.measurer.seconds
        try:
            with machine_lock().working():
                model = step.stage.run(before.model, ctx)
        finally:
            result.seconds = time.perf_counter() - begin - (self.measurer.seconds - measured)
        after_form = self._form_after(step, before, model)
        after_form.save(model, folder)
        model = after_form.load(folder)
        result.form = after_form.NAME
        if after_form is not before.form:
            reference = before.reloaded().model  # the stage may have changed the one that it was given
            same = parity.check(
                before.form.as_callable(reference),
                after_form.as_callable(model),
                self.task,
                int8=parity.is_quantised(reference),
            )
            result.notes.append(same.note())
        content = after_form.content_hash(model)
        unchanged = content == before.hash
        measurement = before.measurement if unchanged else self.measurer.measure(model, folder)
        if ctx.latencies:
            measurement = measurement.with_grid(ctx.latencies)
        result.measurement = measurement
        result.status = "unchanged" if unchanged and not ctx.latencies else "ok"
        return State(model, after_form, folder, content, measurement)

    def _form_after(self, step: Step, before: State, model: Any) -> Form:
        found = form_of(model)
        wanted = before.form.NAME if step.info.gives == "same" else step.info.gives
        if found is None or found.NAME != wanted:
            raise StageError(f"stage '{step.info.name}' gives form '{wanted}' but returned {type(model).__name__}")
        return found

    def _context(self, step: Step, folder: Path, result: StageResult) -> Context:
        seed = int.from_bytes(hashlib.sha256(f"{self.plan.seed} {step.key}".encode()).digest()[:4], "big")
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
        )

    def _choose(self, choice: Choice, before: State) -> State:
        """The first branch that runs inside the budget, or the fastest of all that do."""
        attempts: list[Attempt] = []
        done: list[tuple[float, State, list[StageResult]]] = []
        tried: list[StageResult] = []
        kept = len(self.report.stages)
        for number, branch in enumerate(choice.branches, 1):
            method = "+".join(step.key for step in branch)
            state = before.reloaded()
            try:
                for step in branch:
                    state = self._step(step, state, self._dir(choice) / f"{number}_{step.key}")
                broken = self.plan.budget.quality_violations(self.measurer.validation_drop(state.model))
            except StageError as error:
                broken = [str(error)]
            latency = state.measurement.headline()
            attempts.append(Attempt(method=method, ok=not broken, reason="; ".join(broken) or _figures(state)))
            results = self.report.stages[kept:]
            del self.report.stages[kept:]
            tried += results
            if not broken:
                done.append((latency.speedup if latency else 0.0, state, results))
                if choice.how == "first_of":
                    break
        if not done:
            self.report.stages.extend(tried)
            reasons = "; ".join(f"'{attempt.method}': {attempt.reason}" for attempt in attempts)
            raise StageError(f"no alternative of {choice.how} worked: {reasons}")
        _, state, results = max(done, key=lambda item: item[0])
        results[0].attempts = attempts
        self.report.stages.extend(results)
        return state

    def _finish(self, state: State) -> None:
        folder = manifest.deploy(state.model, state.form.NAME, self.folder, self.plan.target, self.task)
        artifact = next(path for path in sorted(folder.iterdir()) if path.name != manifest.FILE)
        self.report.final = Final(artifact=f"{manifest.FOLDER}/{artifact.name}", measurement=state.measurement)
        drop = self.measurer.validation_drop(state.model)
        self.report.budget.violations = self.plan.budget.violations(drop, state.measurement)
        self.report.status = "over_budget" if self.report.budget.violations else "ok"

    def _dir(self, entry: Entry) -> Path:
        return self.folder / f"{self.number:02d}_{entry.key}"

    def _place(self, step: Step, folder: Path) -> str:
        return f"while running step {self.number} of {len(self.plan.entries)}, '{step.key}', in {folder}"


def _figures(state: State) -> str:
    fastest = state.measurement.headline()
    return f"{fastest.p50_ms:.3f} ms" if fastest else "latency not measured"

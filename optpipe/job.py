"""One run of a command, as Hydra calls it: alone, or as a job of a sweep, in whatever process a launcher chose."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import compose, execute, machine, registry
from optpipe.command import Command
from optpipe.errors import EXIT_INTERRUPTED, EXIT_PROBLEM, OptpipeError, is_interruption
from optpipe.progress import console, log, say
from optpipe.sweep import Ledger, State, cleared

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from optpipe.report import Report


def run(config: DictConfig, command: Command, started: float) -> int:
    """The exit code. In a single run an error becomes one message; in a sweep, what its ledger says of the job.

    started: time.perf_counter() when this run began.
    """
    here = compose.of_hydra()
    if not registry.stages():  # a process of a launcher's
        compose.prepare(command)
    if command.is_sweep:
        machine.share_cores(here.at_once, here.cores)
        return _in_sweep(config, command, here, time.perf_counter())  # `started` may be another process's clock
    try:
        return _show(_executed(config, command, here, started), here.folder)
    except (OptpipeError, OSError) as error:
        if is_interruption(error):
            return _interrupted(here.folder)
        log.exception("the run failed")
        if isinstance(error, OSError):
            error.add_note(f"the run's folder is {here.folder}; free space there, or choose another: hydra.run.dir=…")
        return say_error(error)
    except KeyboardInterrupt:
        return _interrupted(here.folder)


def _interrupted(folder: Path) -> int:
    console.print(f"Interrupted; what was finished is in {folder}", markup=False)
    return EXIT_INTERRUPTED


def _in_sweep(config: DictConfig, command: Command, here: compose.Here, started: float) -> int:
    ledger = Ledger(here.sweep_folder)
    before = ledger.job(here.number)
    if before.is_over:
        say(f"job {here.number} is {before.state.value}: {here.folder}")
        return before.code
    if before.state is State.running:
        say(
            f"job {here.number} is left alone: process {before.pid} of {before.host} runs it; if that is not so, "
            f"delete jobs/{here.number}.json in {here.sweep_folder}"
        )
        return EXIT_PROBLEM
    cleared(here.folder, before)
    with ledger.running(here.number, here.overrides, here.folder) as outcome:
        try:
            outcome.code = _show(_executed(config, command, here, started), here.folder)
        except Exception:
            log.exception("the job ended early")
            raise
    return outcome.code


def _executed(config: DictConfig, command: Command, here: compose.Here, started: float) -> Report:
    again = command.again(here.overrides)
    plan = compose.plan(config, recipe=command.recipe, overrides=here.overrides, subject=command.subject, command=again)
    return execute.execute(plan, here.folder, started)


def _show(report: Report, folder: Path) -> int:
    """Print what came out; the exit code is 1 if the budget was broken and its policy is more than to warn."""
    from optpipe.report import console as shown

    shown.show(shown.table(report))
    for said in (shown.tried, shown.missing, shown.disturbed, shown.forecast, shown.reused):
        print("".join(f"{line}\n" for line in said(report)), end="")
    print(f"{folder}: report.json and model/; {report.seconds:.0f} s")
    if (page := folder / "report.html").exists():
        print(f"page: {page}")
    for violation in report.budget.violations:
        print(f"over budget: {violation}", file=sys.stderr)
    for check in report.budget.checks:
        if check.where == "run" and check.holds and check.undecided:
            print(f"budget: {check.said}", file=sys.stderr)
    return EXIT_PROBLEM if report.budget.violations and report.budget.policy != "warn" else 0


def say_error(error: BaseException) -> int:
    """One message for a person, on standard error; the exit code."""
    notes = [] if isinstance(error, OptpipeError) else getattr(error, "__notes__", [])
    print("\n  ".join([f"{type(error).__name__}: {error}", *notes]), file=sys.stderr)
    return EXIT_PROBLEM

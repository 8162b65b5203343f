"""The command line: compose → check everything → run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

STARTED = time.perf_counter()
# Threads of a parallel loop that wait by spinning make training 8 times slower on 2 cores once anything else uses one
# of them; waiting asleep, 2 times. libgomp reads this when torch is imported. Timed workers keep its default.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXIT_PROBLEM = 1
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run optpipe with the words of the command line; exit with 1 if it could not do what they ask."""
    from optpipe import compose, execute
    from optpipe.command import read
    from optpipe.errors import OptpipeError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended keeps what it has, as with Ctrl-C
    command = read(sys.argv[1:])
    try:
        compose.prepare(command)
        if not command.is_question:
            plans = compose.check(command)
            if any(plan.dry_run for plan in plans):
                print("\n".join(execute.describe(plan) for plan in plans))
                return
            _check_writable(command)
    except OptpipeError as error:
        sys.exit(_say_error(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(_hydra(command))


def _hydra(command: Any) -> int:
    """Hand over to Hydra, which calls the job once, or once per combination of a sweep."""
    import hydra

    from optpipe.compose import CONF

    outcome = {"code": 0}

    def job(config: DictConfig) -> float | None:
        return _job(config, command, outcome)

    sys.argv[1:] = command.argv()
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return outcome["code"]


def _job(config: DictConfig, command: Any, outcome: dict[str, int]) -> float | None:
    """One run. In a sweep an error goes to Hydra; in a single run it becomes one message and the exit code."""
    from hydra.core.hydra_config import HydraConfig

    from optpipe import compose, execute
    from optpipe.errors import OptpipeError
    from optpipe.progress import log

    started, hydra_config = _started(), HydraConfig.get()
    overrides, folder = list(hydra_config.overrides.task), Path(hydra_config.runtime.output_dir)
    try:
        again = command.again(overrides)
        plan = compose.plan(config, recipe=command.recipe, overrides=overrides, subject=command.subject, command=again)
        report = execute.execute(plan, folder, started)
        outcome["code"] = max(outcome["code"], _show(report, folder))  # of a sweep, the worst
        return None
    except (OptpipeError, OSError) as error:
        log.exception("the run failed")
        if command.is_sweep:
            raise
        if isinstance(error, OSError):
            error.add_note(f"the run's folder is {folder}; free space there, or choose another with hydra.run.dir=…")
        outcome["code"] = _say_error(error)
    except KeyboardInterrupt:
        if command.is_sweep:
            raise
        from optpipe.progress import console

        console.print(f"Interrupted; what was finished is in {folder}", markup=False)
        outcome["code"] = EXIT_INTERRUPTED
    return None


_first_job = True


def _started() -> float:
    """When this run began: the first of a process with the process itself, imports included."""
    global _first_job
    first, _first_job = _first_job, False
    return STARTED if first else time.perf_counter()


def _show(report: Any, folder: Path) -> int:
    """Print what came out; the exit code is 1 if the budget was broken and its policy is more than to warn."""
    from optpipe.report import console

    console.show(console.table(report))
    for said in (console.tried, console.missing, console.disturbed, console.forecast, console.reused):
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


def _say_error(error: BaseException) -> int:
    from optpipe.errors import OptpipeError

    notes = [] if isinstance(error, OptpipeError) else getattr(error, "__notes__", [])
    print("\n  ".join([f"{type(error).__name__}: {error}", *notes]), file=sys.stderr)
    return EXIT_PROBLEM


def _check_writable(command: Any) -> None:
    """Hydra makes the run's folder before anybody could catch what goes wrong."""
    from optpipe.errors import RecipeError

    folder = Path(command.output_root)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RecipeError([f"cannot write to '{folder}'; choose another folder with hydra.run.dir=…"], command.subject)


if __name__ == "__main__":
    main()

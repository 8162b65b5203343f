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


def main() -> None:
    """Run optpipe with the words of the command line; exit with 1 if it could not do what they ask."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is ended keeps what it has, as with Ctrl-C
    try:
        _main()
    except KeyboardInterrupt:  # when no job was running
        from optpipe.errors import EXIT_INTERRUPTED

        sys.exit(EXIT_INTERRUPTED)


def _main() -> None:
    from optpipe import compose, execute
    from optpipe.command import read
    from optpipe.errors import OptpipeError
    from optpipe.job import say_error

    command = read(sys.argv[1:])
    try:
        compose.prepare(command)
        if not command.is_question:
            plans = compose.check(command)
            if any(plan.dry_run for plan in plans):
                print(execute.described(plans))
                return
            _check_writable(command)
    except OptpipeError as error:
        sys.exit(say_error(error))
    if command.is_question:
        sys.exit(_hydra(command))
    sys.exit(_sweep(command) if command.is_sweep else _run(command))


def _hydra(command: Any) -> int:
    """Hand over to Hydra, which calls the job once, or once per combination of a sweep."""
    import hydra

    from optpipe.compose import CONF
    from optpipe.errors import EXIT_INTERRUPTED

    outcome = {"code": 0}

    def job(config: DictConfig) -> None:
        from optpipe import job

        outcome["code"] = job.run(config, command, started=_started())

    sys.argv[1:] = command.argv()
    command.composed.clear()  # the job takes the command to other processes
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as ended:  # Hydra ends what its launcher cannot do; of a sweep there is more to say
        if not command.is_sweep:
            raise
        return ended.code if isinstance(ended.code, int) else 1
    return outcome["code"]


def _run(command: Any) -> int:
    """A single run, in a folder of its own or in the one that it was given."""
    from optpipe import run_folder
    from optpipe.errors import RecipeError
    from optpipe.job import say_error

    if command.run_dir is None:
        return _hydra(command)
    try:
        with run_folder.held(command.run_dir, command.subject):
            return _hydra(command)
    except RecipeError as error:
        return say_error(error)


def _sweep(command: Any) -> int:
    """Every job of a sweep that is not done yet; 1 if one failed or broke its budget."""
    from optpipe import compose, sweep
    from optpipe.errors import EXIT_INTERRUPTED, RecipeError
    from optpipe.job import say_error
    from optpipe.report.__main__ import main as report
    from optpipe.tracking.live import finish_sweep

    try:
        jobs, search = compose.combinations(command), compose.search(command)
        asked = command.again(command.overrides, alone=False)
        folder = sweep.folder_for(command.sweep_dir, command.argv(), jobs, command.subject)
        command.move_sweep_to(folder.absolute())
        ledger = sweep.Ledger(folder)
        with sweep.alone(folder, command.subject), sweep.watched(ledger):
            code = _hydra(command)
    except RecipeError as error:
        return say_error(error)
    found = ledger.jobs()
    if any(job.state is sweep.State.done for job in found):
        weights = search.settings.weights if search else {}
        report([str(folder), *(["--weights", *(f"{k}={v}" for k, v in weights.items())] if weights else [])])
    finish_sweep(folder)
    waits = [job for job in found if job.state is sweep.State.waiting]
    for job in found:
        if job.state is not sweep.State.done and not (job in waits and code == EXIT_INTERRUPTED):
            print(f"job {job.number} {job.state.value}: {job.reason or job.said()}", file=sys.stderr)
    if code == EXIT_INTERRUPTED:
        print(f"Interrupted; {len(waits)} of {len(found)} jobs wait, and the same command goes on", file=sys.stderr)
    elif waits:
        print("the same command goes on with what is not done", file=sys.stderr)
    elif search is not None and code == 0:
        return _answer(command, ledger, asked) if search.settings.is_for_goal else sweep.searched(found)
    undone = any(job.state is not sweep.State.done for job in found)
    return max(code, int(undone), *(job.code for job in found))


def _answer(command: Any, ledger: Any, asked: str) -> int:
    """Say whether the goal of the search `asked` is met, and leave the plain recipe; 1 if it is not."""
    from optpipe import compose
    from optpipe.search import goal

    found = goal.best(ledger)
    if found is None:
        print("the goal is not met: no job came to its end", file=sys.stderr)
        return 1
    job, report, is_met = found
    print("\n".join(goal.said(job, report, is_met)))
    text = goal.opening(asked, job, report, is_met) + compose.recipe_of(job.overrides, command)
    path, again = goal.write(text, ledger.folder, is_met)
    print(f"{path}:\n\n{path.read_text()}")
    if command.config_dir:
        print(f"copy it to {command.config_dir / 'recipe'}, and run it from there")
    else:
        print(again)
    return int(not is_met)


_first_job = True


def _started() -> float:
    """When this run began: the first of a process with the process itself, imports included."""
    global _first_job
    first, _first_job = _first_job, False
    return STARTED if first else time.perf_counter()


def _check_writable(command: Any) -> None:
    """Hydra makes the run's folder before anybody could catch what goes wrong."""
    from optpipe.errors import RecipeError

    folder = Path(command.output_root)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        key = "hydra.sweep.dir" if command.is_sweep else "hydra.run.dir"
        raise RecipeError([f"cannot write to '{folder}'; choose another folder with {key}=…"], command.subject)


if __name__ == "__main__":
    main()

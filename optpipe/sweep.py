"""A sweep: its ledger, written as it goes, from which the same command goes on, and what a person sees meanwhile.

The folder of a sweep holds sweep.json, which names the command and every job that it makes, `jobs` with the state of
each, and a folder per job. Only the process of a job writes its state, or who knows that this process has ended, so
that launchers may run jobs anywhere that sees the folder.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from optpipe.errors import OverBudget, RecipeError, is_interruption
from optpipe.progress import console, say
from optpipe.run_folder import remove

FILE, JOBS, LOCK = "sweep.json", "jobs", ".lock"
LATELY_SECONDS = 1.0  # between two looks at the ledger, for the live table
QUEUED = "SLURM_JOB_ID"  # that Slurm gives a job
CLOCK_SECONDS = 2.0  # by which the time when a process began may be wrong
KEPT = (".hydra", "optpipe.log")  # of a job's folder that is run again: what Hydra has just written


class State(Enum):
    """Of a job."""

    waiting = "waiting"
    running = "running"
    done = "done"
    failed = "failed"
    stopped = "stopped"  # it broke its budget, whose policy is to stop there


ENDED = (State.done, State.failed, State.stopped)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: list[str] = field(default_factory=list)
    state: State = State.waiting
    seconds: float = 0.0
    reason: str = ""  # why it failed
    code: int = 0  # that it would have ended with, had it been run alone
    folder: str = ""
    host: str = ""
    pid: int = 0
    started: float = 0.0  # seconds since 1970
    queued: str = ""  # Slurm's number of it, which a job keeps when it is queued again

    @property
    def is_over(self) -> bool:
        """Whether it is not run again by itself."""
        return self.state in (State.done, State.stopped)

    def said(self, common: Sequence[str] = ()) -> str:
        """Its own settings, without those that all jobs share."""
        own = [override for override in self.overrides if override not in common]
        return " ".join(own) or "no settings of its own"


class Ledger:
    """The jobs of the sweep in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def told(self) -> dict[str, Any]:
        """sweep.json. Raises OSError, ValueError if there is none."""
        found: dict[str, Any] = json.loads((self.folder / FILE).read_text())
        return found

    def begin(self, words: Sequence[str], jobs: Sequence[Sequence[str]]) -> None:
        """Write down the command, and every job that it will make as waiting."""
        (self.folder / JOBS).mkdir(parents=True, exist_ok=True)
        told = {
            "command": list(words),
            "jobs": [list(job) for job in jobs],
            "begun": time.time(),
            "id": uuid.uuid4().hex,
        }
        _write(self.folder / FILE, told)

    def jobs(self) -> list[Job]:
        """All of them, in order. A job that no process runs any more is waiting again."""
        planned = self.told["jobs"]
        found = {number: Job(number=number, overrides=overrides) for number, overrides in enumerate(planned)}
        for path in (self.folder / JOBS).glob("*.json"):
            try:
                read = json.loads(path.read_text())
                job = Job(**{**read, "state": State(read["state"])})
            except (ValueError, TypeError, KeyError):
                continue  # written by another version: the job is run again
            if job.state is State.running and is_gone(job):
                job = replace(job, state=State.waiting)
            found[job.number] = job
        return [found[number] for number in sorted(found)]

    def rest(self) -> list[Job]:
        """What the same command would run. A search, which plans no job, has learned from those that failed."""
        over = (State.done, State.stopped) if any(self.told["jobs"]) else ENDED
        return [job for job in self.jobs() if job.state not in over]

    def job(self, number: int) -> Job:
        return next((job for job in self.jobs() if job.number == number), Job(number=number))

    def write(self, job: Job) -> None:
        (self.folder / JOBS).mkdir(parents=True, exist_ok=True)
        _write(self.folder / JOBS / f"{job.number}.json", {**asdict(job), "state": job.state.value})

    @contextmanager
    def running(self, number: int, overrides: Sequence[str], folder: Path = Path()) -> Iterator[Outcome]:
        """One job while it runs. What it raises is its reason, and does not leave here.

        But a person's Ctrl-C does, and a queue's request to end, to begin again elsewhere (SystemExit).
        """
        begin, outcome, planned = time.time(), Outcome(), self.told["jobs"]
        asked = planned[number] if number < len(planned) else []
        words = asked or overrides  # as a person wrote them, not as Hydra does; a search plans none
        job = Job(
            number=number, overrides=list(words), state=State.running, host=socket.gethostname(), pid=os.getpid(),
            started=begin, folder=str(folder), queued=os.environ.get(QUEUED, ""),
        )  # fmt: skip
        self.write(job)
        try:
            yield outcome
        except (KeyboardInterrupt, SystemExit):
            self.write(replace(job, state=State.waiting))
            raise
        except OverBudget as error:
            job = replace(job, state=State.stopped, reason=str(error), code=1)
        except Exception as error:  # one job that fails neither ends nor hides the others
            if is_interruption(error):
                self.write(replace(job, state=State.waiting))
                raise KeyboardInterrupt from error
            reason = f"{type(error).__name__}: {error}"
            job = replace(job, state=State.failed, reason=reason, code=1)
        else:
            job = replace(job, state=State.done, code=outcome.code)
        self.write(replace(job, seconds=time.time() - begin))
        self.tell(job)

    def refuse(self, number: int, overrides: Sequence[str], reason: str) -> None:
        """Say why a job cannot be begun."""
        job = Job(number=number, overrides=list(overrides), state=State.failed, reason=reason, code=1)
        self.write(job)
        self.tell(job)

    def plan(self, count: int) -> None:
        """Say how many jobs there will be, where their settings are not known before."""
        _write(self.folder / FILE, {**self.told, "jobs": [[]] * count})

    def died(self, number: int, reason: str, *, again: bool = False) -> bool:
        """Write down a job whose process is known to have ended before it could do so itself; False if it could.

        again: it waits; otherwise it has failed.
        """
        job = self.job(number)
        if job.state in ENDED:
            self.tell(job)
            return False
        if again:
            self.write(replace(job, state=State.waiting))
            say(f"job {number} waits to begin again: {reason}")
        else:
            job = replace(job, state=State.failed, reason=reason, code=1)
            self.write(job)
            self.tell(job)
        return True

    def tell(self, job: Job) -> None:
        """One line about what became of `job`."""
        jobs = self.jobs()
        over = sum(found.state in ENDED for found in jobs)
        common = common_overrides(jobs)
        reason = f": {' '.join(line.strip() for line in job.reason.splitlines()[:2])}" if job.reason else ""
        say(f"[{over} of {len(jobs)} jobs] {job.number} {job.state.value}, {job.said(common)}{reason}{left(jobs)}")


def searched(jobs: Sequence[Job]) -> int:
    """The exit code of a search: 0 if a job kept its budget."""
    return int(not any(job.state is State.done and job.code == 0 for job in jobs))


@dataclass
class Outcome:
    """What a job tells its ledger."""

    code: int = 0


def left(jobs: Sequence[Job]) -> str:
    """The time that the rest is expected to take, as in "; about 3 min left"."""
    over = [job for job in jobs if job.state in ENDED and job.seconds]
    rest = sum(job.state in (State.waiting, State.running) for job in jobs)
    if not over or not rest:
        return ""
    at_once = max(1, sum(job.state is State.running for job in jobs))
    seconds = rest * sum(job.seconds for job in over) / len(over) / at_once
    return f"; about {seconds / 60:.0f} min left" if seconds >= 90 else f"; about {seconds:.0f} s left"


def common_overrides(jobs: Sequence[Job]) -> list[str]:
    """Those that all jobs have, as far as their settings are known."""
    known = [job.overrides for job in jobs if job.overrides]
    shared = set.intersection(*map(set, known)) if len(known) > 1 else set()
    return [override for override in (known[0] if known else ()) if override in shared]


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).exists()


def folder_for(root: Path | None, words: Sequence[str], jobs: Sequence[Sequence[str]], subject: str) -> Path:
    """Where to run the sweep `words`: the folder of an earlier one of the same words that is not over, or a new one.

    root: the folder that the command names; None for one below outputs/sweeps.
    Raises RecipeError if the named folder holds another sweep, or what is no sweep.
    """
    if root is not None:
        if "${" in str(root):
            raise RecipeError([f"hydra.sweep.dir is '{root}'; name a folder, without ${{…}}"], subject)
        if not (root / FILE).exists():
            if root.is_dir() and any(path.name != LOCK for path in root.iterdir()):
                raise RecipeError([f"'{root}' holds other files; give the sweep a folder of its own"], subject)
            Ledger(root).begin(words, jobs)
        elif (other := Ledger(root).told["command"]) != list(words):
            said = f"'{root}' holds another sweep ({' '.join(other)}); give it a folder of its own"
            raise RecipeError([said], subject)
        return root
    below = Path("outputs") / "sweeps"
    for path in sorted(below.glob(f"*/{FILE}"), reverse=True):
        ledger = Ledger(path.parent)
        try:
            if ledger.told["command"] != list(words):
                continue
            rest = ledger.rest()
        except (OSError, ValueError, KeyError):
            continue
        if rest:
            say(f"the sweep in {ledger.folder} goes on: {len(rest)} of its {len(ledger.jobs())} jobs are not done")
            return ledger.folder
        break
    folder = below / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    Ledger(folder).begin(words, jobs)
    return folder


@contextmanager
def alone(folder: Path, subject: str) -> Iterator[None]:
    """Hold a sweep's folder. Raises RecipeError if another process does."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        said = f"another process runs the sweep in '{folder}'; wait for it, or name another with hydra.sweep.dir=…"
        raise RecipeError([said], subject) from None
    try:
        yield
    finally:
        lock.release()


def cleared(folder: Path, before: Job) -> None:
    """Remove what an attempt that did not end, `before`, left in its folder; its finished steps are in the store."""
    if before.folder != str(folder):
        return  # what lies there is not of this job
    for path in folder.glob("*"):
        if path.name not in KEPT:
            remove(path)


@contextmanager
def watched(ledger: Ledger) -> Iterator[None]:
    """A live table of the jobs, on a terminal; elsewhere their own lines are all."""
    if not console.is_terminal:
        yield
        return
    from rich.live import Live

    ended = threading.Event()
    to_terminal = sys.stdout.isatty()  # else what is printed goes to a file, and not through the table
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=to_terminal) as live:

        def watch() -> None:
            shown: list[Job] = []
            while not ended.wait(LATELY_SECONDS):
                if (jobs := ledger.jobs()) != shown:
                    shown = jobs
                    live.update(view(jobs), refresh=True)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def view(jobs: Sequence[Job]) -> Any:
    """The jobs as a rich table; of many, those that run and the latest of the others."""
    from rich.box import SIMPLE
    from rich.table import Table

    common = common_overrides(jobs)
    counts = {state: sum(job.state is state for job in jobs) for state in State}
    title = ", ".join(f"{count} {state.value}" for state, count in counts.items() if count)
    found = Table(title=f"{title}{left(jobs)}", title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("job", "state", "time", "settings"):
        found.add_column(column, no_wrap=True)
    for job in [job for job in jobs if job.state is not State.waiting][-12:]:
        since = time.strftime("since %H:%M:%S", time.localtime(job.started))  # it is not redrawn while a job runs
        took = since if job.state is State.running else f"{job.seconds:.0f} s"
        found.add_row(str(job.number), job.state.value, took, job.said(common))
    return found


def is_gone(job: Job) -> bool:
    """Whether the process of a running job has ended. Of another machine's only Slurm knows: it runs a job once."""
    import psutil

    if job.queued and job.queued == os.environ.get(QUEUED) and job.pid != os.getpid():
        return True  # this is the same one, begun again
    if job.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(job.pid)
        younger = process.create_time() > job.started + CLOCK_SECONDS  # another process that was given its number
        return bool(younger or process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _write(path: Path, told: Any) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(told, indent=1) + "\n")
    partial.replace(path)

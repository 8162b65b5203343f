"""A sweep as its tracker sees it: which one a run is a job of, and what is told at its end."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from optpipe.errors import OptpipeError
from optpipe.report import front
from optpipe.report.runs import Run, read
from optpipe.report.schema import FILE as REPORT
from optpipe.sweep import ENDED, Job, Ledger, State, common_overrides, is_sweep
from optpipe.tracking import entries, shown
from optpipe.tracking.journal import FILE as JOURNAL
from optpipe.tracking.journal import Event, Journal

PLACE = ("uri", "experiment", "artifacts")  # of a first event's content: where in MLflow a run goes


def of(folder: Path) -> dict[str, Any] | None:
    """The sweep that the run in `folder` is a job of, for the run's first event. None if it is no sweep's."""
    for root in filter(is_sweep, folder.absolute().parents):
        try:
            jobs = Ledger(root).jobs()
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody else's sweep.json
        if job := _job(root, folder.absolute(), jobs):
            shared = [*Ledger(root).told["command"], *common_overrides(jobs)]
            own = [override for override in job.overrides if override not in shared]
            return _identity(root) | {"job": " ".join([str(job.number), *own])}
    return None


def folders(root: Path, file: str) -> list[Path]:
    """Of the jobs of the sweep in `root`, in their order, those folders that hold `file`."""
    jobs = Ledger(root).jobs()
    found = {job.number: path.parent for path in root.rglob(file) if (job := _job(root, path.parent, jobs))}
    return [found[number] for number in sorted(found)]


def ended(folder: Path) -> list[Event]:
    """What is told of the sweep in `folder` as it is now, an event for each place in MLflow that its jobs go to.

    Empty if none was tracked. It is the same when it is asked again: its time is that of the last job's end.
    """
    jobs, identity = Ledger(folder).jobs(), _identity(folder)
    places = [place for path in folders(folder, JOURNAL) if (place := _place(path))]
    if not places:
        return []
    runs, count = _runs(folder), Counter(job.state for job in jobs)
    best = front.best(runs)
    told = identity | {
        "status": _status(count), "best": best.name if best else "", "front": list(map(shown, front.said(runs))),
        "counts": {"jobs": len(jobs), **{f"jobs_{state.value}": count[state] for state in ENDED}},
        "figures": entries.metrics(best.final) if best else {},
    }  # fmt: skip
    at = max(identity["begun"], *(job.started + job.seconds for job in jobs))
    return [Event.of("sweep", told | place, at) for i, place in enumerate(places) if place not in places[:i]]


def _runs(folder: Path) -> list[Run]:
    """The jobs of the sweep in `folder` whose reports can be read."""
    found = []
    for path in folders(folder, REPORT):
        with suppress(OptpipeError):
            found.append(read(path, str(path.relative_to(folder))))
    return found


def _job(root: Path, folder: Path, jobs: Sequence[Job]) -> Job | None:
    """The one whose run lies in `folder`: below a sweep's folder others may lie, and it may have been moved."""
    own = folder.relative_to(root).parts
    return next((job for job in jobs if own and Path(job.folder).parts[-len(own) :] == own), None)


def _identity(folder: Path) -> dict[str, Any]:
    told, name = Ledger(folder).told, folder.absolute().name
    command = shown(shlex.join(["python", "-m", "optpipe", *told["command"]]))
    known_by = told.get("id", str(told["begun"]))  # those of an earlier optpipe have none
    return {"id": known_by, "name": name, "command": command, "begun": told["begun"]}


def _status(count: Counter[State]) -> str:
    if count[State.running]:
        return "running"
    return "interrupted" if count[State.waiting] else "failed" if count[State.failed] else "done"


def _place(folder: Path) -> dict[str, Any]:
    """Where the run in `folder` goes; empty where that cannot be read."""
    try:
        first = Journal(folder).read()[:1]
    except OptpipeError:
        return {}
    return {name: first[0].content[name] for name in PLACE} if first and first[0].kind == "start" else {}

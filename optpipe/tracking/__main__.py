"""python -m optpipe.tracking push FOLDER…: deliver to MLflow what a run could not, or was not asked to.

It makes the run that the tracker would have made, once: what was delivered before is not delivered again, and what was
interrupted is completed. Of a sweep's folder it delivers every job, then the sweep. The exit code is 1 if something
could not be delivered, 0 if it is there now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from optpipe.errors import EXIT_INTERRUPTED, OptpipeError, named_reason, reason
from optpipe.plan import read_config
from optpipe.progress import log
from optpipe.report import Report
from optpipe.report.runs import read
from optpipe.report.schema import FILE as REPORT
from optpipe.sweep import is_sweep
from optpipe.tracking import Tracking, shown, sweeps
from optpipe.tracking.delivery import Delivery
from optpipe.tracking.journal import Event, Journal, of_report
from optpipe.tracking.live import deliver_sweep, first, origin


class Undelivered(OptpipeError):
    """A store that failed."""


def main(words: Sequence[str] | None = None) -> int:
    """Do what `words` ask; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m optpipe.tracking", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pushed = commands.add_parser("push", help="deliver finished runs and sweeps")
    pushed.add_argument(
        "folder", nargs="+", type=Path, metavar="FOLDER", help="outputs/runs/<time>, outputs/sweeps/<time>"
    )
    pushed.add_argument("--uri", help="of the store; by default the one that the run was to go to")
    pushed.add_argument("--experiment", help="by default the one that the run was to go to")
    asked = parser.parse_args(words)
    try:
        return max([_pushed(folder, asked.uri, asked.experiment) for folder in asked.folder])
    except KeyboardInterrupt:
        print("Interrupted; push again for the rest: what was delivered is not delivered twice", file=sys.stderr)
        return EXIT_INTERRUPTED


def _pushed(folder: Path, uri: str | None, experiment: str | None) -> int:
    """Deliver a run, or a sweep's jobs and the sweep, and say what was done; the exit code."""
    code = 0
    for one in [*sweeps.folders(folder, REPORT), folder] if is_sweep(folder) else [folder]:
        try:
            print(f"{one}: {push(one, uri, experiment)}")
        except OptpipeError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
            if isinstance(error, Undelivered):  # nor would the others be
                break
        except OSError as error:
            print(f"error: {one} cannot be written ({reason(error)}); push notes there what it did", file=sys.stderr)
            code = 1
    return code


def push(folder: Path, uri: str | None = None, experiment: str | None = None) -> str:
    """Deliver the run or sweep in `folder`; what was done, in words. Raises OptpipeError if that cannot be done."""
    if is_sweep(folder):
        return _push_sweep(folder, uri, experiment)
    report, journal = read(folder).report, Journal(folder)
    with journal.alone():
        events = journal.read()
        if run_id := _delivered(events, report):
            if events and uri:
                _refuse_twice(folder, events[0], events[-1], uri)
            return f"already delivered as run {run_id}"
        if not events or events[-1].kind != "finish":
            events = of_report(report, folder, events[0].content if events else _first(report, folder))
            journal.replace(events)
        begin = _elsewhere(events[0], uri, experiment)
        run_id = _deliver([begin, *events[1:]], folder)
        journal.add(Event.of("delivered", {"run_id": run_id, "uri": begin.content["uri"]}))
    return f"delivered as run {run_id} to {shown(begin.content['uri'])}"


def _push_sweep(folder: Path, uri: str | None, experiment: str | None) -> str:
    """Its own run; its jobs' are delivered before."""
    said, journal = [], Journal(folder)
    with journal.alone():
        kept = journal.read()
        for event in sweeps.ended(folder):
            if delivered := next((after for told, after in pairwise(kept) if told == event), None):
                if uri:
                    _refuse_twice(folder, event, delivered, uri)
                said.append(f"already delivered as run {delivered.content['run_id']}")
                continue
            to = _elsewhere(event, uri, experiment)
            with _named(folder, to):
                said.append(f"delivered as run {deliver_sweep(event, to, folder)} to {shown(to.content['uri'])}")
    return "; ".join(said) or "none of its jobs is in MLflow, so there is nothing to add"


def _refuse_twice(folder: Path, first: Event, delivered: Event, uri: str) -> None:
    """Raises OptpipeError if what was delivered went to another place than `uri`."""
    before, asked = delivered.content.get("uri", first.content["uri"]), _elsewhere(first, uri, None).content["uri"]
    if before != asked:
        raise OptpipeError(
            f"{folder} was delivered to {shown(before)} before, as run {delivered.content['run_id']}, and goes to one "
            f"place only; nothing was delivered to {shown(asked)}"
        )


def _delivered(events: list[Event], report: Report) -> str:
    """The run's id, if all of it is there. A run without a journal was tracked before there were any, or not at all."""
    if not events:
        return report.mlflow_run_id
    return str(events[-1].content["run_id"]) if events[-1].kind == "delivered" else ""


def _first(report: Report, folder: Path) -> dict[str, object]:
    config = read_config(folder)
    asked = config.get("tracking") or {}
    settings = Tracking(uri=asked.get("uri"), experiment=asked.get("experiment") or Tracking.experiment)
    return first(settings, {"recipe": report.recipe, **config}, folder, Path.cwd())


def _elsewhere(start: Event, uri: str | None, experiment: str | None) -> Event:
    """`start` with the place that the command line names."""
    told = start.content
    try:
        settings = Tracking(uri=uri, experiment=experiment or told["experiment"])
    except ValueError as error:
        raise OptpipeError(f"--{error}") from None
    place = {"uri": settings.store(Path.cwd()), "artifacts": None} if uri else {}
    return replace(start, content=told | place | {"experiment": settings.experiment})


def _deliver(events: list[Event], folder: Path) -> str:
    """The run's id, which its report has before that is delivered itself."""
    delivery = Delivery(folder, again=True)
    with _named(folder, events[0]):
        for event in events:
            delivery.tell(event)
            if event.kind == "start":
                _write_back(delivery.run_id, folder)
    return delivery.run_id


@contextmanager
def _named(folder: Path, first: Event) -> Iterator[None]:
    """Raise Undelivered for whatever MLflow, its database or the store of its artifacts raise."""
    try:
        yield
    except Exception as error:
        log.info("push failed", exc_info=True)
        uri = shown(first.content["uri"])
        raise Undelivered(
            f"{folder} is not delivered: {uri} failed ({named_reason(origin(error))}); push it again when that works, "
            "or name another store with --uri"
        ) from error


def _write_back(run_id: str, folder: Path) -> None:
    """Put the id into report.json, whole or not at all; whatever else it holds stays."""
    content = json.loads((folder / REPORT).read_text())
    if content["mlflow_run_id"] != run_id:
        partial = folder / f".{REPORT}.partial"
        partial.write_text(json.dumps(content | {"mlflow_run_id": run_id}, indent=2) + "\n")
        partial.rename(folder / REPORT)


if __name__ == "__main__":
    sys.exit(main())

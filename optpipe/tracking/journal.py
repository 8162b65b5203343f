"""What a run has told its tracker, in a file of its own folder: what could not be delivered is delivered from it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from optpipe.errors import OptpipeError
from optpipe.progress import log
from optpipe.report import NotMeasured, Report
from optpipe.report.schema import FILE as REPORT

FILE = "tracking.jsonl"

Kind = Literal["start", "baseline", "stage", "rolled_back", "finish", "sweep", "delivered"]


@dataclass(frozen=True)
class Event:
    """One thing that was told. It holds nothing but what JSON does, so that it is the same when it is read again."""

    kind: Kind
    time_ms: int  # since 1970: told again, it is logged at the same time, and so is no second figure
    content: dict[str, Any]

    @classmethod
    def of(cls, kind: Kind, content: dict[str, Any], seconds: float | None = None) -> Event:
        """seconds: since 1970; None is now."""
        now = time.time() if seconds is None else seconds
        return cls(kind, int(now * 1000), json.loads(json.dumps(content, default=str)))


class Journal:
    """The events of the run in `folder`, one JSON object per line."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = FileLock(folder / f".{FILE}.lock")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While one process delivers, no other does. Raises OptpipeError if one does already."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OptpipeError(
                f"{self.path.parent} is being delivered by its run or another push; let it end"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    def hold(self) -> None:
        """As `alone`, until `release` or the end of this process; where files cannot be locked, nothing."""
        try:
            self._lock.acquire(timeout=0)
        except (OSError, NotImplementedError):
            log.info("%s cannot be locked", self.path.parent, exc_info=True)

    def release(self) -> None:
        self._lock.release()

    def add(self, event: Event) -> None:
        """Append. Raises OSError where that cannot be written."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(event)) + "\n")

    def replace(self, events: list[Event]) -> None:
        """Hold `events` and no others, whole or not at all."""
        partial = self.path.with_name(f".{FILE}.partial")
        partial.write_text("".join(json.dumps(asdict(event)) + "\n" for event in events))
        partial.rename(self.path)

    def read(self) -> list[Event]:
        """What was told. Raises OptpipeError if that cannot be read."""
        if not self.path.exists():
            return []
        try:
            return [Event(**json.loads(line)) for line in self.path.read_text().splitlines()]
        except (ValueError, TypeError) as error:
            raise OptpipeError(
                f"{self.path} is damaged ({error}); without it, push takes what report.json has"
            ) from None


def start(
    config: dict[str, Any], folder: Path, *, uri: str, experiment: str, artifacts: str | None,
    sweep: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The content of a run's first event.

    artifacts: where a new experiment's go; None leaves that to the store. sweep: that the run is a job of.
    """
    return {
        "run": uuid.uuid4().hex, "folder": str(folder), "recipe": config.get("recipe") or "pipeline", "config": config,
        "uri": uri, "experiment": experiment, "artifacts": artifacts, "sweep": sweep,
    }  # fmt: skip


def stage(position: int, result: Any) -> dict[str, Any]:
    """position: how many were told before it."""
    return {"position": position, "result": asdict(result)}


def finish(report: Report) -> dict[str, Any]:
    final = report.final
    known = {} if isinstance(final, NotMeasured) else asdict(final)
    return {"status": report.status, "error": report.error, "final": known}


def of_report(report: Report, folder: Path, first: dict[str, Any]) -> list[Event]:
    """The events of a run that was not tracked.

    Its report does not say when a step was done: it is taken to have followed upon the one before it.
    """
    ended = (folder / REPORT).stat().st_mtime
    now = ended - report.seconds
    events = [Event.of("start", first, now)]
    now += report.model_seconds + report.rehearsal_seconds
    if not isinstance(report.baseline, NotMeasured):
        events.append(Event.of("baseline", asdict(report.baseline), now))
    for position, result in enumerate(report.stages):
        now += result.seconds
        events.append(Event.of("stage", stage(position, result), now))
    return [*events, Event.of("finish", finish(report), ended)]

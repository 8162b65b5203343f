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
from optpipe.report import NotMeasured, Report
from optpipe.report.schema import FILE as REPORT

FILE = "tracking.jsonl"

Kind = Literal["start", "baseline", "stage", "rolled_back", "finish", "delivered"]


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
        """As `alone`, until `release` or the end of this process."""
        self._lock.acquire(timeout=0)

    def release(self) -> None:
        self._lock.release()

    def add(self, *events: Event) -> None:
        """Append. Raises OSError where that cannot be written."""
        lines = "".join(json.dumps(asdict(event)) + "\n" for event in events)
        with self.path.open("a") as file:
            file.write(lines)

    def read(self) -> list[Event]:
        """What was told; the last line may be cut off, since nothing came after it."""
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_text().split("\n")
        return [Event(**json.loads(line)) for line in lines]


def start(config: dict[str, Any], folder: Path, *, uri: str, experiment: str, artifacts: str | None) -> dict[str, Any]:
    """The content of a run's first event. artifacts: where a new experiment's go; None leaves that to the store."""
    return {
        "run": uuid.uuid4().hex, "folder": str(folder), "recipe": config.get("recipe") or "pipeline", "config": config,
        "uri": uri, "experiment": experiment, "artifacts": artifacts,
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

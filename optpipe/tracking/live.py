"""The tracker of a run that works: what happens is delivered at once, as long as that can be done."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optpipe.errors import RecipeError, named_reason, reason
from optpipe.progress import console, log, say
from optpipe.report import Measurement, Report, StageResult
from optpipe.tracking import Tracking, journal, shown, sweeps
from optpipe.tracking.delivery import Delivery, cannot_connect
from optpipe.tracking.journal import Event, Journal, Kind

PUSH = "python -m optpipe.tracking push"


class MlflowTracker:
    """Into an MLflow store through its client: no global session, so it runs inside anybody's program.

    A store that fails once is left alone for the rest of the run, whose result does not depend on it.
    """

    def __init__(self, settings: Tracking, root: Path) -> None:
        self.settings, self.root = settings, root
        self._is_down = False
        self._told: list[StageResult] = []

    def start(self, config: dict[str, Any], folder: Path) -> str:
        """Open the parent run and return its id, empty if the store fails.

        Raises RecipeError if this installation lacks what such a store needs.
        """
        self._folder, self._journal, self._delivery = folder, Journal(folder), Delivery(folder)
        self._journal.hold()
        self._tell("start", first(self.settings, config, folder, self.root))
        return self._delivery.run_id

    def baseline(self, measurement: Measurement) -> None:
        self._tell("baseline", asdict(measurement))

    def stage(self, result: StageResult) -> None:
        self._told.append(result)
        self._tell("stage", journal.stage(len(self._told) - 1, result))

    def rolled_back(self, result: StageResult) -> None:
        """One that was told, the very object."""
        position = next(number for number, told in enumerate(self._told) if told is result)
        self._tell("rolled_back", {"position": position})

    def finish(self, report: Report, folder: Path) -> None:
        self._tell("finish", journal.finish(report))
        if not self._is_down:
            self._keep(Event.of("delivered", {"run_id": self._delivery.run_id}))
        self._journal.release()

    def _tell(self, kind: Kind, content: dict[str, Any]) -> None:
        event = Event.of(kind, content)
        self._keep(event)
        if self._is_down:
            return
        ended_by = sys.exception()
        try:
            self._delivery.tell(event)
        except Exception as error:  # whatever MLflow, its database or the store of its artifacts raise
            found = origin(error, ended_by)
            if cannot_connect(found) and not self._delivery.run_id:
                raise RecipeError([self._lacking(found)]) from error
            self._is_down = True
            log.info("tracking failed", exc_info=True)
            uri = shown(self.settings.store(self.root))
            say(f"tracking: {uri} failed ({named_reason(found)}); this run goes on without it")
            say(f"  deliver it later: {PUSH} {self._folder}")

    def _keep(self, event: Event) -> None:
        try:
            self._journal.add(event)
        except OSError:  # a full disk, which the run itself tells of; what was delivered is not lost by it
            log.info("%s cannot be written", self._journal.path, exc_info=True)

    def _lacking(self, error: BaseException) -> str:
        uri, missing = shown(self.settings.uri or ""), reason(error)
        return (
            f"tracking.uri is '{uri}', and what connects to it is not installed ({missing}); install that, or take "
            "another store, or tracking=none"
        )


def first(settings: Tracking, config: dict[str, Any], folder: Path, root: Path) -> dict[str, Any]:
    """The content of a run's first event, with the place that `settings` name."""
    artifacts = str(root / "mlruns") if settings.uri is None else None
    uri = settings.store(root)
    sweep = sweeps.of(folder)
    return journal.start(config, folder, uri=uri, experiment=settings.experiment, artifacts=artifacts, sweep=sweep)


def finish_sweep(folder: Path) -> None:
    """Tell the sweep's own run how it ended, if its jobs were tracked. A store that fails costs one message."""
    for event in sweeps.ended(folder):
        try:
            with Journal(folder).alone():
                deliver_sweep(event, event, folder)
        except Exception as error:  # whatever MLflow, its database or the store of its artifacts raise
            said = f"tracking: {shown(event.content['uri'])} failed ({named_reason(origin(error))})"
            push = f"  deliver the sweep later: {PUSH} {folder}"
            console.print(f"{said}\n{push}", markup=False)  # Hydra, done with the jobs, would show what is logged again
            return


def deliver_sweep(event: Event, to: Event, folder: Path) -> str:
    """The id of the sweep's run. Its journal holds `event` then as delivered, `to` is `event` with the place to go to.

    Raises whatever MLflow, its database or the store of its artifacts raise.
    """
    delivery, kept = Delivery(folder, again=True), Journal(folder)
    delivery.tell(to)
    kept.add(event)
    kept.add(Event.of("delivered", {"run_id": delivery.run_id, "uri": to.content["uri"]}))
    return delivery.run_id


def origin(error: BaseException, ended_by: BaseException | None = None) -> BaseException:
    """What `error` came of: libraries wrap a refused connection four times. ended_by: what was raised before it."""
    while (inner := error.__cause__ or error.__context__) is not None and inner is not ended_by:
        error = inner
    return error

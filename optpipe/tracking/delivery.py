"""The events of a run, as one run of an MLflow store with a nested run per stage; a sweep's, as the run above them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from optpipe.machine import user_cache
from optpipe.report import Measurement, StageResult
from optpipe.report.runs import SWEEP
from optpipe.report.schema import typed
from optpipe.sweep import is_sweep
from optpipe.tracking import entries
from optpipe.tracking.journal import Event

# MLflow has these in the environment only. Its own wait four minutes for a dead server, 0 retries and one time-out;
# a request that is repeated because its answer was late would make a second run. Whoever has set one keeps it.
TIMEOUT, SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", 10
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", TIMEOUT: str(SECONDS)}
SILENCE = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
UPLOAD_RATE = 1_000_000  # bytes per second at least: a server may answer only when it has put a large model elsewhere


class Delivery:
    """Of one run's events to one store. What is told twice is there once.

    again: some of it may have been told before, by a process that did not come to its end.
    """

    def __init__(self, folder: Path, *, again: bool = False) -> None:
        self.folder, self.again = folder, again
        self.run_id = ""
        self._experiment_id = ""
        self._stages: dict[int, str] = {}  # run ids by position

    def tell(self, event: Event) -> None:
        """Log one event. Raises whatever MLflow, its database or the store of its artifacts raise."""
        tell = {
            "start": self._start, "baseline": self._baseline, "stage": self._stage,
            "rolled_back": self._rolled_back, "finish": self._finish, "sweep": self._sweep,
        }[event.kind]  # fmt: skip
        with _environment(PATIENCE | SILENCE), _one_attempt():
            tell(event)

    def _start(self, event: Event) -> None:
        """Open the store and the run in it, below that of its sweep if it is a sweep's."""
        told = event.content
        self._open(told)
        sweep = told.get("sweep")
        above = {"mlflow.parentRunId": self._run_of(sweep)} if sweep else {}
        known = self._search(f"tags.`optpipe.run` = '{told['run']}'") if self.again else []
        if known:
            self.run_id = known[0].info.run_id
            nested = self._search(f"tags.`mlflow.parentRunId` = '{self.run_id}'", limit=1000)
            self._stages = {int(run.data.tags["optpipe.position"]): run.info.run_id for run in nested}
        else:
            name = f"{told['recipe']} {datetime.fromtimestamp(event.time_ms / 1000):%m-%d %H:%M:%S}"
            tags = {"optpipe.run": told["run"], "optpipe.folder": told["folder"]}
            self.run_id = self._create(event.time_ms, sweep["job"] if sweep else name, tags | above)
        self._log(self.run_id, event, params=entries.flat(told["config"]))
        self._client.log_text(self.run_id, json.dumps(told["config"], indent=2), "config.json")

    def _open(self, told: dict[str, Any]) -> None:
        with _one_at_a_time(), _private_files():
            from mlflow import MlflowClient

            self._client = MlflowClient(told["uri"])
            self._experiment_id = self._experiment(told["experiment"], told["artifacts"])

    def _run_of(self, sweep: dict[str, Any]) -> str:
        """The run above those of a sweep's jobs, made by the first of them that gets here."""
        root = next((folder for folder in (self.folder, *self.folder.absolute().parents) if is_sweep(folder)), None)
        with FileLock((root or self.folder) / ".mlflow.lock"):
            found = self._search(f"tags.`optpipe.sweep` = '{sweep['id']}'")
            if not found:
                tags = {"optpipe.sweep": sweep["id"], "optpipe.command": sweep["command"]}
                return self._create(int(sweep["begun"] * 1000), sweep["name"], tags)
        if found[0].info.status != "RUNNING" and not self.again:  # an earlier command came to an end, this one goes on
            self._client.update_run(found[0].info.run_id, "RUNNING")
        return str(found[0].info.run_id)

    def _sweep(self, event: Event) -> None:
        """How a sweep ended, what it made of its best run, and its page."""
        told = event.content
        self._open(told)
        self.run_id = self._run_of(told)
        figures = told["figures"]
        self._log(self.run_id, event, metrics=told["counts"] | entries.prefixed("best", figures))
        self._log(self.run_id, event, metrics=entries.headline(figures))
        tags = {"optpipe.status": told["status"], "optpipe.best": told["best"]}
        for name, value in {**tags, "mlflow.note.content": "\n\n".join(told["front"])}.items():
            self._client.set_tag(self.run_id, name, value)
        if (self.folder / SWEEP).exists():
            self._upload(self.folder / SWEEP)
        if told["status"] == "running":
            return
        left = f"tags.`mlflow.parentRunId` = '{self.run_id}' and attributes.status = 'RUNNING'"
        for job in self._search(left, limit=1000):  # of processes that were killed
            self._client.set_terminated(job.info.run_id, "KILLED", max(event.time_ms, job.info.start_time))
        status = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[told["status"]]
        self._client.set_terminated(self.run_id, status, event.time_ms)

    def _baseline(self, event: Event) -> None:
        """The baseline's figures, as `baseline/…`."""
        figures = entries.metrics(typed(Measurement, event.content))
        self._log(self.run_id, event, metrics=entries.prefixed("baseline", figures))
        self._log(self.run_id, event, metrics=entries.headline(figures))

    def _stage(self, event: Event) -> None:
        """A nested run with the stage's figures, which the parent has too, as `quantize/…`."""
        position, result = event.content["position"], typed(StageResult, event.content["result"])
        if position not in self._stages:
            started = event.time_ms - int(result.seconds * 1000)
            self._stages[position] = self._create(started, result.key, self._tags(position, result))
        run_id = self._stages[position]
        figures = {"seconds": result.seconds, **entries.metrics(result.measurement)}
        self._log(run_id, event, metrics=figures, params=entries.flat(result.facts))
        if result.notes:
            self._client.set_tag(run_id, "mlflow.note.content", "\n\n".join(result.notes))
        self._client.set_terminated(run_id, "FAILED" if result.status == "failed" else "FINISHED", event.time_ms)
        self._log(self.run_id, event, metrics=entries.prefixed(result.key, figures))
        self._log(self.run_id, event, metrics=entries.headline(figures), step=position + 1)

    def _tags(self, position: int, result: StageResult) -> dict[str, str]:
        tags = {
            "mlflow.parentRunId": self.run_id, "optpipe.position": str(position), "optpipe.stage": result.stage,
            "optpipe.status": result.status, "optpipe.reused": str(result.cached).lower(),
            "optpipe.store_key": result.store_key, "optpipe.sha256": result.model_sha256,
        }  # fmt: skip
        if result.cached and (found := self._computed_by(result.store_key)):
            tags["optpipe.computed_by"] = found
        return {name: value for name, value in tags.items() if value}

    def _computed_by(self, store_key: str) -> str:
        """The run of the stage that computed a result; empty if that was not tracked in this experiment."""
        found = self._search(f"tags.`optpipe.store_key` = '{store_key}' and tags.`optpipe.reused` = 'false'")
        return found[0].info.run_id if found else ""

    def _rolled_back(self, event: Event) -> None:
        """The stage's result was dropped again."""
        self._client.set_tag(self._stages[event.content["position"]], "optpipe.status", "rolled_back")

    def _finish(self, event: Event) -> None:
        """The final figures, report and model, and how the run ended."""
        told = event.content
        if final := told["final"]:
            figures = entries.metrics(typed(Measurement, final["measurement"]))
            self._log(self.run_id, event, metrics=entries.prefixed("final", figures))
            self._client.set_tag(self.run_id, "optpipe.sha256", self._sha256(final["artifact"]))
            self._upload(self.folder / "model")
        self._client.set_tag(self.run_id, "optpipe.status", told["status"])
        for file in ("report.json", "report.html"):
            if (self.folder / file).exists():
                self._upload(self.folder / file)
        killed = told["error"] == "KeyboardInterrupt"
        status = "KILLED" if killed else "FAILED" if told["status"] == "failed" else "FINISHED"
        self._client.set_terminated(self.run_id, status, event.time_ms)

    def _upload(self, path: Path) -> None:
        """A file, or a folder under its name, with more patience the larger the largest file is."""
        files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        seconds = SECONDS + max(file.stat().st_size for file in files) // UPLOAD_RATE
        with _environment({TIMEOUT: str(seconds)}):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))

    def _sha256(self, artifact: str) -> str:
        """Of the deployed file, as its manifest has it. artifact: its path in the run's folder."""
        path = self.folder / artifact
        manifest = json.loads((path.parent / "manifest.json").read_text())
        return str(manifest["files"][path.name]["sha256"])

    def _experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        if artifacts is not None:
            Path(artifacts).mkdir(mode=0o700, exist_ok=True)
            artifacts = Path(artifacts).as_uri()
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)  # by a run on another machine, in between
            if found is None:
                raise
            return str(found.experiment_id)

    def _create(self, started_ms: int, name: str, tags: dict[str, str]) -> str:
        run = self._client.create_run(self._experiment_id, start_time=started_ms, run_name=name, tags=tags)
        return str(run.info.run_id)

    def _search(self, condition: str, limit: int = 1) -> list[Any]:
        return list(self._client.search_runs([self._experiment_id], condition, max_results=limit))

    def _log(
        self,
        run_id: str,
        event: Event,
        metrics: dict[str, float] | None = None,
        params: dict[str, str] | None = None,
        step: int = 0,
    ) -> None:
        from mlflow.entities import Metric, Param

        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, event.time_ms, step) for name, value in (metrics or {}).items()],
            params=[Param(name, value) for name, value in (params or {}).items()],
        )


def cannot_connect(error: BaseException) -> bool:
    """Whether `error` says that this installation has no driver for a store, whatever state the store is in."""
    from sqlalchemy.exc import ArgumentError

    return isinstance(error, (ImportError, ArgumentError))


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """MLflow's variables as `wanted`, unless the user has set them; afterwards as they were."""
    before = {name: os.environ.get(name) for name in wanted}
    ours = {name: value for name, value in before.items() if value is None or value == PATIENCE.get(name)}
    os.environ.update({name: wanted[name] for name in ours})
    try:
        yield
    finally:
        for name, value in ours.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _one_attempt() -> Iterator[None]:
    """MLflow tries to connect to a database ten times, which takes 100 s; the number is a constant of its module."""
    from mlflow.store.db import utils

    before = utils.MAX_RETRY_COUNT
    utils.MAX_RETRY_COUNT = 1
    try:
        yield
    finally:
        utils.MAX_RETRY_COUNT = before


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two processes that create one database at once crash."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    with FileLock(user_cache() / "mlflow.lock"):
        yield


@contextmanager
def _private_files() -> Iterator[None]:
    """Files made meanwhile are readable by their owner only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)

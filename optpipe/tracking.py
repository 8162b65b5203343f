"""MLflow: one run per recipe, one nested run per stage. `none` is an object with the same methods."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from optpipe.errors import RecipeError, reason
from optpipe.machine import user_cache
from optpipe.report import Measurement, NotMeasured, Report, StageResult

# Logged in their own right; the rest of the configuration is in the artifact config.json.
PARAM_LIMIT = 500  # characters of a value


class Backend(Enum):
    """Where runs are recorded besides their own folder."""

    mlflow = "mlflow"
    none = "none"


@dataclass(kw_only=True)
class Tracking:
    """The settings under `tracking:`."""

    backend: Backend = Backend.mlflow
    uri: str | None = None  # null: mlflow.db in the folder that the command was started in
    experiment: str = "optpipe"


class Tracker(Protocol):
    """What the pipeline tells as it goes."""

    def start(self, config: dict[str, Any], folder: Path) -> str: ...
    def baseline(self, measurement: Measurement) -> None: ...
    def stage(self, result: StageResult) -> None: ...
    def rolled_back(self, result: StageResult) -> None: ...
    def finish(self, report: Report, folder: Path) -> None: ...


def tracker(settings: Tracking, root: Path) -> Tracker:
    """The tracker that `settings` ask for. `root`: the folder that the default store lies in."""
    return NoTracker() if settings.backend is Backend.none else MlflowTracker(settings, root)


class NoTracker:
    """Records nothing."""

    def start(self, config: dict[str, Any], folder: Path) -> str:
        return ""

    def baseline(self, measurement: Measurement) -> None:
        """Nothing to do."""

    def stage(self, result: StageResult) -> None:
        """Nothing to do."""

    def rolled_back(self, result: StageResult) -> None:
        """Nothing to do."""

    def finish(self, report: Report, folder: Path) -> None:
        """Nothing to do."""


class MlflowTracker:
    """Records into an MLflow store through its client: no global session, so it runs inside anybody's program."""

    def __init__(self, settings: Tracking, root: Path) -> None:
        self.settings, self.root = settings, root
        self._run_id = ""
        self._experiment_id = ""
        self._steps = 0
        self._stage_runs: dict[str, str] = {}  # the latest of each step

    def start(self, config: dict[str, Any], folder: Path) -> str:
        """Open the parent run and return its id. Raises RecipeError if the store cannot be opened."""
        with _one_at_a_time(), _private_files():
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException

            try:
                self._client = MlflowClient(self._uri())
                self._experiment_id = self._experiment()
            except MlflowException as error:
                problem = (
                    f"the MLflow store {self._uri()} cannot be used ({reason(error)}); mend tracking.uri, or "
                    "tracking=none"
                )
                raise RecipeError([problem]) from error
        name = f"{config.get('recipe') or 'pipeline'} {datetime.now():%m-%d %H:%M:%S}"
        run = self._client.create_run(self._experiment_id, run_name=name, tags={"optpipe.folder": str(folder)})
        self._run_id = str(run.info.run_id)
        self._log(self._run_id, params=_flat(config))
        self._client.log_text(self._run_id, json.dumps(config, indent=2, default=str), "config.json")
        return self._run_id

    def baseline(self, measurement: Measurement) -> None:
        """The baseline's figures, as `baseline/…`."""
        metrics = _metrics(measurement)
        self._log(self._run_id, metrics=_prefixed("baseline", metrics))
        self._log(self._run_id, metrics=_headline(metrics), step=0)

    def stage(self, result: StageResult) -> None:
        """A nested run with the stage's figures, which the parent has too, as `quantize/…`."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        tags = {MLFLOW_PARENT_RUN_ID: self._run_id, "optpipe.stage": result.stage, "optpipe.status": result.status}
        ended = int(time.time() * 1000)
        started = ended - int(result.seconds * 1000)
        run = self._client.create_run(self._experiment_id, start_time=started, run_name=result.key, tags=tags)
        self._stage_runs[result.key] = run.info.run_id
        metrics = {"seconds": result.seconds, **_metrics(result.measurement)}
        self._log(run.info.run_id, metrics=metrics, params=_flat(result.facts))
        if result.notes:
            self._client.set_tag(run.info.run_id, "mlflow.note.content", "\n\n".join(result.notes))
        self._client.set_terminated(run.info.run_id, "FAILED" if result.status == "failed" else "FINISHED", ended)
        self._log(self._run_id, metrics=_prefixed(result.key, metrics))
        self._steps += 1
        self._log(self._run_id, metrics=_headline(metrics), step=self._steps)

    def rolled_back(self, result: StageResult) -> None:
        """The stage's result was dropped again."""
        self._client.set_tag(self._stage_runs[result.key], "optpipe.status", "rolled_back")

    def finish(self, report: Report, folder: Path) -> None:
        """The final figures, report and model, and how the run ended."""
        final = report.final
        if not isinstance(final, NotMeasured):
            self._log(self._run_id, metrics=_prefixed("final", _metrics(final.measurement)))
            self._client.log_artifacts(self._run_id, str(folder / "model"), "model")
        self._client.set_tag(self._run_id, "optpipe.status", report.status)
        for file in ("report.json", "report.html"):
            if (folder / file).exists():
                self._client.log_artifact(self._run_id, str(folder / file))
        killed = report.error == "KeyboardInterrupt"
        status = "KILLED" if killed else "FAILED" if report.status == "failed" else "FINISHED"
        self._client.set_terminated(self._run_id, status)

    def _uri(self) -> str:
        return self.settings.uri or f"sqlite:///{self.root / 'mlflow.db'}"

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.settings.experiment)
        if found is not None:
            return str(found.experiment_id)
        artifacts = None
        if self.settings.uri is None:
            folder = self.root / "mlruns"
            folder.mkdir(mode=0o700, exist_ok=True)
            artifacts = folder.as_uri()
        return str(self._client.create_experiment(self.settings.experiment, artifact_location=artifacts))

    def _log(
        self,
        run_id: str,
        metrics: dict[str, float] | None = None,
        params: dict[str, str] | None = None,
        step: int = 0,
    ) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, step) for name, value in (metrics or {}).items()],
            params=[Param(name, value) for name, value in (params or {}).items()],
        )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two processes that create one database at once crash."""
    from filelock import FileLock

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


def _metrics(measurement: Measurement | NotMeasured) -> dict[str, float]:
    """Every figure that was measured, by a short name."""
    if isinstance(measurement, NotMeasured):
        return {}
    metrics: dict[str, float] = {}
    for name in ("size_bytes", "compressed_bytes", "peak_memory_bytes"):
        if not isinstance(value := getattr(measurement, name), NotMeasured):
            metrics[name] = value
    if not isinstance(quality := measurement.quality, NotMeasured):
        metrics |= {"quality": quality.value, "quality_delta": quality.delta}
    if latency := measurement.headline():
        metrics |= {name: getattr(latency, name) for name in ("p50_ms", "p95_ms", "std_ms", "throughput", "speedup")}
        if not isinstance(latency.speedup_same_runtime, NotMeasured):
            metrics["speedup_same_runtime"] = latency.speedup_same_runtime
    if not isinstance(measurement.latency, NotMeasured) and len(measurement.latency) > 1:
        for entry in measurement.latency:
            metrics[f"{entry.runtime}_b{entry.batch_size}_t{entry.threads}_p50_ms"] = entry.p50_ms
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _headline(metrics: dict[str, float]) -> dict[str, float]:
    """The figures that a parent run has by their bare names too, so that they share columns with its stages' runs."""
    return {name: metrics[name] for name in ("size_bytes", "quality", "p50_ms", "speedup") if name in metrics}


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names, for MLflow's parameters."""
    if isinstance(config, dict) and config:
        return {
            name: value
            for key, inner in config.items()
            for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: str(config)[:PARAM_LIMIT]} if prefix else {}

"""MLflow: a run per recipe, below it one per stage, above it its sweep's. `none` is an object with the same methods."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from optpipe.errors import did_you_mean
from optpipe.report import Measurement, Report, StageResult

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")
PLUGINS = "mlflow.tracking_store"  # MLflow's entry points for others


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

    def __post_init__(self) -> None:
        if self.uri is not None:
            _check(self.uri)
        if not self.experiment:
            raise ValueError("experiment is empty; name one, for example tracking.experiment=optpipe")

    def store(self, root: Path) -> str:
        """MLflow's name for the store. root: the folder that a relative one lies in."""
        prefix = "sqlite:///"
        if self.uri and not self.uri.startswith(prefix):
            return self.uri
        return f"{prefix}{root / (self.uri or 'mlflow.db').removeprefix(prefix)}"


def shown(uri: str) -> str:
    """`uri` without the password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _check(uri: str) -> None:
    """Raise ValueError for what names no store, whatever may be reached."""
    scheme, separator, _ = uri.partition(":")
    if not separator:  # a folder, or the word that stands for Databricks
        return
    known = {*SCHEMES, *(plugin.name for plugin in entry_points(group=PLUGINS))}
    if scheme.partition("+")[0] not in known:
        hint = did_you_mean(scheme, known) or "; use http://HOST:PORT, https://…, sqlite:///FILE or postgresql://…"
        raise ValueError(f"uri is '{shown(uri)}', and MLflow has no '{scheme}' store{hint}")
    if scheme not in ("http", "https"):
        return
    try:
        address = urlsplit(uri)
        host, _ = address.hostname, address.port
    except ValueError as error:
        raise ValueError(f"uri is '{shown(uri)}', which is no address ({error}); use {scheme}://HOST:PORT") from None
    if not host:
        raise ValueError(f"uri is '{shown(uri)}', which names no server; use {scheme}://HOST:PORT")


class Tracker(Protocol):
    """What the pipeline tells as it goes."""

    def start(self, config: dict[str, Any], folder: Path) -> str: ...
    def baseline(self, measurement: Measurement) -> None: ...
    def stage(self, result: StageResult) -> None: ...
    def rolled_back(self, result: StageResult) -> None: ...
    def finish(self, report: Report, folder: Path) -> None: ...


def tracker(settings: Tracking, root: Path) -> Tracker:
    """The tracker that `settings` ask for. `root`: the folder that the default store lies in."""
    from optpipe.tracking.live import MlflowTracker

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

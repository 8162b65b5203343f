"""Fixtures: somebody's project outside this repository, and one real run of the main recipe."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from command import Finished, finish, start
from filelock import FileLock

OUTSIDE = Path(__file__).parent / "outside"


def pytest_configure() -> None:
    """A core for each of several workers: torch processes with a thread on every core slow one another down tenfold.

    And Ctrl-C is heard by the commands that tests start, which a shell's `… &` would have them ignore.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of the test session have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user cache of each worker's own, as on a fresh machine.

    With one for all, and so one lock, workers would wait for what the others time; each has a core of its own, and no
    test asks how long something takes.
    """
    folder = tmp_path_factory.getbasetemp() / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the outside project's network, really trained."""
    import my_network

    path = tmp_path_factory.mktemp("weights") / "my_weights.safetensors"
    my_network.train(path)
    return path


@pytest.fixture
def project(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the outside project to work in."""
    folder = tmp_path / "project"
    shutil.copytree(OUTSIDE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(weights, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def empty_mlflow(shared: Path) -> Path:
    """A database of MLflow's without experiments: making one takes seconds (edge_runs makes its own)."""
    path = shared / "empty_mlflow.db"
    with FileLock(shared / "empty_mlflow.lock"):
        if not path.exists():
            from mlflow import MlflowClient

            partial = path.with_suffix(".partial")
            MlflowClient(f"sqlite:///{partial}").search_experiments()
            partial.rename(path)
    return path


@pytest.fixture
def optpipe(project: Path, cache: Path, empty_mlflow: Path) -> Any:
    """Runs `python -m optpipe …` in the outside project."""
    shutil.copy(empty_mlflow, project / "mlflow.db")
    return lambda *words: finish(start(project, *words, cache=cache), project)


@pytest.fixture(scope="session")
def edge_runs(shared: Path, cache: Path) -> tuple[Finished, Finished]:
    """The main recipe, started twice at once on a machine that has never run it, in two folders.

    The second without what changes nothing in what comes out: rehearsal, previews, benchmark and tracking.
    """
    done = shared / "edge_runs.pickle"
    with FileLock(shared / "edge_runs.lock"):  # one worker runs it for all
        if not done.exists():
            done.write_bytes(pickle.dumps(_edge_runs(shared, cache)))
    first, second = pickle.loads(done.read_bytes())
    return first, second


def _edge_runs(shared: Path, cache: Path) -> list[Finished]:
    folders = [shared / "first", shared / "second"]
    anywhere = "measure.noise_limit=1000"  # the tests ask for relations between figures, on machines that are not quiet
    words = ("+recipe=edge_int8", "measure=quick", anywhere, "distill.epochs=2", f"store.folder={shared / 'store'}")
    short = ("tracking=none", "rehearse=false", "pipeline=[simplify,prune,distill,quantize,trace,export]")
    more = [("measure.previews=true",), short]
    for folder in folders:
        folder.mkdir()
    processes = [start(folder, *words, *own, cache=cache) for folder, own in zip(folders, more, strict=True)]
    pairs = zip(processes, folders, strict=True)  # on a machine whose cores other tests want, too
    return [finish(process, folder, timeout=900) for process, folder in pairs]


@pytest.fixture(scope="session")
def edge_run(edge_runs: tuple[Finished, Finished]) -> Finished:
    return edge_runs[0]

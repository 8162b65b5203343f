"""Fixtures: somebody's project outside this repository, and one real run of the main recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

OUTSIDE = Path(__file__).parent / "outside"
sys.path.append(str(OUTSIDE))  # in-process tests import its modules as a user in that folder would


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str
    folder: Path  # that it was started in

    @property
    def run(self) -> Path:
        """The folder of the only run."""
        (folder,) = (self.folder / "outputs" / "runs").iterdir()
        return folder

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.run / "report.json").read_text())


def start(folder: Path, *words: str, cache: Path) -> subprocess.Popen[str]:
    """`python -m optpipe …` in `folder`, as a user would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "optpipe", *words],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], folder: Path) -> Finished:
    out, err = process.communicate(timeout=300)
    return Finished(process.returncode, out, err, folder)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user cache of the test session's own, as on a fresh machine."""
    folder = tmp_path_factory.mktemp("cache")
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


@pytest.fixture
def optpipe(project: Path, cache: Path) -> Any:
    """Runs `python -m optpipe …` in the outside project."""
    return lambda *words: finish(start(project, *words, cache=cache), project)


@pytest.fixture(scope="session")
def edge_runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Finished, Finished]:
    """The main recipe, started twice at once on a machine that has never run it, in two folders."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    words = ("+recipe=edge_int8", "measure=quick", "distill.epochs=4")
    processes = [start(folder, *words, cache=cache) for folder in folders]
    first, second = (finish(process, folder) for process, folder in zip(processes, folders, strict=True))
    return first, second


@pytest.fixture(scope="session")
def edge_run(edge_runs: tuple[Finished, Finished]) -> Finished:
    return edge_runs[0]

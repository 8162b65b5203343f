"""`python -m optpipe` as a user starts it: a real process in a folder of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def finish(process: subprocess.Popen[str], folder: Path, timeout: float = 300) -> Finished:
    out, err = process.communicate(timeout=timeout)
    return Finished(process.returncode, out, err, folder)

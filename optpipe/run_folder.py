"""A folder that a single run was given (hydra.run.dir): one run's at a time, and never one that is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optpipe.errors import RecipeError

LOCK = ".optpipe.lock"
OWN = ("[0-9][0-9]_*", "model", "quality", "samples", "report.json", "report.html", "config.json")


@contextmanager
def held(folder: Path, subject: str) -> Iterator[None]:
    """Hold `folder`, without what a run left there that did not end well; its finished steps are in the store.

    Raises RecipeError if the folder holds a run that is done, or one that still works there.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError([f"another process runs in '{folder}'; wait for it, or {_ELSEWHERE}"], subject) from None
    try:
        if _is_done(folder):
            raise RecipeError([f"'{folder}' holds a run that is done; move it away, or {_ELSEWHERE}"], subject)
        _clear(folder)
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


_ELSEWHERE = "choose another folder with hydra.run.dir=…"


def _is_done(folder: Path) -> bool:
    try:
        status = json.loads((folder / "report.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(status != "failed")


def _clear(folder: Path) -> None:
    """Only what runs write: the folder may hold files of the user's."""
    if not (folder / ".hydra").is_dir():
        return
    for path in (found for pattern in OWN for found in folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

"""A folder that a single run was given (hydra.run.dir) is that run's alone, and what it leaves is not overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optpipe.errors import RecipeError

MARK = ".optpipe.lock"  # stays until a run has ended well: what a run writes, and lies beside it, is that run's
WRITTEN = ("[0-9][0-9]_*", "model", "quality", "samples", "config.json", "report.json", "report.html")


@contextmanager
def held(folder: Path, subject: str) -> Iterator[None]:
    """Hold `folder`, without what a run left there that did not end well; its finished steps are in the store.

    Raises RecipeError if the folder holds a run that is done, one that still works there, or something that was there
    before the first run: only a folder that was empty is a run's own.
    """
    from filelock import FileLock, Timeout

    remedy = "choose another folder with hydra.run.dir=…"
    folder.mkdir(parents=True, exist_ok=True)
    if _is_done(folder):
        raise RecipeError([f"'{folder}' holds a run that is done; {remedy}"], subject)
    if any(folder.iterdir()) and not (folder / MARK).exists():
        raise RecipeError([f"'{folder}' holds other files; {remedy}"], subject)
    lock = FileLock(folder / MARK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError([f"another process runs in '{folder}'; wait for it, or {remedy}"], subject) from None
    try:
        _clear(folder)
        yield
    finally:
        if _is_done(folder):
            (folder / MARK).unlink(missing_ok=True)
        lock.release()


def _is_done(folder: Path) -> bool:
    try:
        status = json.loads((folder / "report.json").read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(status != "failed")


def _clear(folder: Path) -> None:
    for path in (found for pattern in WRITTEN for found in folder.glob(pattern)):
        remove(path)


def remove(path: Path) -> None:
    """A file, a link, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

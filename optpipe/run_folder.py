"""A folder that a single run was given (hydra.run.dir) is that run's alone, and what it leaves is not overwritten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optpipe.errors import RecipeError

MARK = ".optpipe.lock"  # stays until a run has ended well: what lies beside it is that run's


@contextmanager
def held(folder: Path, subject: str) -> Iterator[None]:
    """Hold `folder`, without what a run left there that did not end well; its finished steps are in the store.

    Raises RecipeError if the folder holds a run that is done, one that still works there, or anything else: nothing is
    removed but what a run of optpipe's has written into a folder that was empty.
    """
    from filelock import FileLock, Timeout

    remedy = "choose another folder with hydra.run.dir=…"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARK).exists():
        what = "a run that is done" if _is_done(folder) else "other files"
        raise RecipeError([f"'{folder}' holds {what}; {remedy}"], subject)
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
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()

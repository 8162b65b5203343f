"""A child process that answers one question: whatever it does to itself, the parent sleeps and lives on.

A runtime may crash, or leave a pool of spinning threads behind that slows everything its process times afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from optpipe.measure.nursery import MeasureError


def ask(module: str, request: dict[str, Any], *, what: str, threads: int, timeout_seconds: float) -> dict[str, Any]:
    """The answer of `python -m module` to `request`, both JSON.

    what: the work in words, for the error.
    Raises MeasureError, with the child's last words, if it dies or takes longer than `timeout_seconds`.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=timeout_seconds,
            start_new_session=True,  # Ctrl-C is for the parent, which kills the child
            env={**inherited, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    except subprocess.TimeoutExpired as error:
        raise MeasureError(
            f"{what} took longer than {timeout_seconds:g} s and was ended; its last words: {_last_words(error.stderr)}"
        ) from None
    if done.returncode:
        raise MeasureError(f"{what} died (exit code {done.returncode}); its last words: {_last_words(done.stderr)}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child's side of `ask`: what the runtime prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(answer(json.load(sys.stdin)), out, allow_nan=False)
    out.close()


def _last_words(stderr: bytes | None) -> str:
    lines = (stderr or b"").decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"

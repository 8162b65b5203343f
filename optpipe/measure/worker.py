"""A process that times one model: `python -m optpipe.measure.worker`, spoken to in lines of JSON.

It reads requests from standard input and answers each with one line on what was standard output; anything that the
model prints goes to standard error. It imports torch only for a model that runs in torch.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from optpipe.forms import form
from optpipe.runtimes import Runner, runtime

SETTLE_SECONDS = 1.0  # at most, before the first block
MIN_CALLS = 3


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = json.loads(sys.stdin.readline())
    engine = runtime(start["runtime"])
    run = engine.runner(form(engine.TAKES).load(Path(start["folder"])), start["threads"])
    gc.disable()  # a collection in the middle of a call would be timed with it
    calls: dict[str, Callable[[], Any]] = {}
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        path = request["inputs"]
        if path not in calls:
            calls[path] = bound_call(run, path)
            settle(calls[path])
        nanoseconds = block(calls[path], request["seconds"])
        gc.collect()
        answer = {"milliseconds": [ns / 1e6 for ns in nanoseconds], "peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps(answer), file=answers)


def bound_call(run: Runner, path: str) -> Callable[[], Any]:
    """`run` on the arrays in the .npz file at `path`: those named by a number go in by position."""
    arrays = dict(np.load(path))
    args = [arrays[key] for key in sorted((key for key in arrays if key.isdigit()), key=int)]
    kwargs = {key: array for key, array in arrays.items() if not key.isdigit()}
    return lambda: run(*args, **kwargs)


def settle(call: Callable[[], Any]) -> None:
    """Call until two neighbouring windows agree within 5 %, or SETTLE_SECONDS have passed."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    last = float("inf")
    while time.perf_counter() < deadline:
        fastest = min(block(call, 0.02))
        if abs(fastest - last) < 0.05 * last:
            return
        last = fastest


def block(call: Callable[[], Any], seconds: float) -> list[int]:
    """Nanoseconds of each of the calls made within `seconds`, at least MIN_CALLS; one call before them warms up."""
    call()
    times: list[int] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MIN_CALLS or time.perf_counter() < deadline:
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return times


def peak_memory_bytes() -> int:
    """Most resident memory that this process has had, from its own start on.

    On Linux from VmHWM: ru_maxrss there starts with the size of the parent that forked it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()

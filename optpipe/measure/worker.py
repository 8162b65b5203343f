"""A nursery of processes that time models: `python -m optpipe.measure.worker RUNTIME SOCKET`.

The nursery imports one runtime, once, and then forks a fresh process for every model that is to be timed: a process in
a few milliseconds instead of seconds, so that a comparison can afford many. Both speak lines of JSON; the nursery over
the socket whose number it was given, each child over a socket of its own. What a model prints goes to the child's log.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from optpipe import forms
from optpipe.runtimes import RUNTIMES, Runner, Runtime, runtime
from optpipe.runtimes.options import OPTIONS

SETTLE_SECONDS = 1.0  # at most, before the first block
WINDOW_SECONDS = 0.005  # of the calls whose times are compared to see whether they have settled
MAX_PADDING_BYTES = 2**20
LINE_BYTES = 65536


def main() -> None:
    """Fork a child for each request that brings a socket and a log; end and reap one for {"reap": pid}.

    {"import": [name]} has modules imported that the next children need.
    """
    engine = runtime(sys.argv[1])
    for name in RUNTIMES[engine.NAME]:
        forms.form(name)  # imported before the first fork
    control = socket.socket(fileno=int(sys.argv[2]))
    gc.freeze()  # a child's collections look only at what it made itself
    control.sendall(b"{}\n")
    children: set[int] = set()
    while True:
        text, files, _, _ = socket.recv_fds(control, LINE_BYTES, 2)
        if not text:
            break
        if files:
            pid = _fork(engine, control, *files)
            children.add(pid)
            answer = {"pid": pid}
        elif modules := json.loads(text).get("import"):
            _import(modules)
            answer = {}
        else:
            pid = json.loads(text)["reap"]
            children.remove(pid)
            answer = {"exit": _reap(pid)}
        control.sendall(json.dumps(answer).encode() + b"\n")
    for pid in children:  # the parent has ended without closing them
        os.kill(pid, signal.SIGKILL)


def _import(modules: list[str]) -> None:
    """Import what models need to be loaded, so that not every child has to."""
    for module in modules:
        with contextlib.suppress(Exception):  # a child that needs it says what is wrong with it
            importlib.import_module(module)
    gc.freeze()


def _fork(engine: Runtime, control: socket.socket, channel: int, log: int) -> int:
    pid = os.fork()
    if pid:
        os.close(channel)
        os.close(log)
        return pid
    control.close()
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        Timer(engine, socket.socket(fileno=channel)).serve()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(code)  # without what the nursery's interpreter would still want to do


def _reap(pid: int) -> int:
    """End the child `pid` if it still runs; its exit code, negative for a signal, 0 if it was only told to go."""
    for _ in range(20):  # one that has crashed may still be writing its last words
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


class Timer:
    """A child's end: loads one model and times it as it is asked to."""

    def __init__(self, engine: Runtime, channel: socket.socket) -> None:
        self._engine = engine
        self._lines = channel.makefile("rwb", buffering=0)
        self._calls: dict[str, Callable[[], Any]] = {}
        # Where memory lies decides up to 1 % of a time, and forks would all have it lie in one place. Padding of random
        # size moves it (Mytkowicz et al., "Producing wrong data without doing anything obviously wrong!", 2009).
        self._padding = np.ones(random.SystemRandom().randrange(MAX_PADDING_BYTES), np.uint8)

    def serve(self) -> None:
        """Answer requests until the parent closes the channel."""
        gc.disable()  # a collection in the middle of a call would be timed with it
        for line in self._lines:
            request = json.loads(line)
            answer = getattr(self, request.pop("do"))(**request)
            answer |= {"peak_memory_bytes": peak_memory_bytes(), "cpu_seconds": time.process_time()}
            self._lines.write(json.dumps(answer).encode() + b"\n")
            gc.collect()

    def load(
        self, folder: str, form: str, threads: int, device: str, options: dict[str, Any], cores: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Load the model saved in `folder`, to run on `cores`, or where the scheduler puts it if there are none.

        modules: where the classes of its parts were defined.
        """
        if cores:
            os.sched_setaffinity(0, cores)  # inherited by the threads that the runtime starts
        begin = time.perf_counter_ns()
        model = forms.form(form or RUNTIMES[self._engine.NAME][0]).load(Path(folder))
        self._run = self._engine.runner(model, threads, device, OPTIONS[self._engine.NAME](**options))
        load = (time.perf_counter_ns() - begin) / 1e6
        parts = model.modules() if hasattr(model, "modules") else ()
        return {"load_ms": load, "modules": sorted({type(part).__module__ for part in parts})}

    def run(self, inputs: str, outputs: str) -> dict[str, Any]:
        """Call once on the arrays in one .npz file, and leave what comes out in another, by number."""
        found = bound_call(self._run, inputs)()
        np.savez(outputs, **{str(i): array for i, array in enumerate(found)})
        return {}

    def warm_up(self, inputs: str) -> dict[str, Any]:
        """Call until the time of a call has settled; the first call's time."""
        call = self._calls[inputs] = bound_call(self._run, inputs)
        begin = time.perf_counter_ns()
        call()
        first = time.perf_counter_ns() - begin
        settle(call)
        return {"first_call_ms": first / 1e6}

    def block(self, inputs: str, seconds: float) -> dict[str, Any]:
        """Milliseconds of each of the calls made within `seconds`."""
        return {"milliseconds": [ns / 1e6 for ns in block(self._calls[inputs], seconds)]}

    def callers(self, inputs: str, seconds: float, count: int) -> dict[str, Any]:
        """Milliseconds of the calls that `count` threads make at once within `seconds`, and how long they took."""
        times: list[list[int]] = [[] for _ in range(count)]
        begins: list[float] = []
        start = threading.Barrier(count)

        def work(mine: list[int]) -> None:
            start.wait()
            begins.append(time.perf_counter())
            mine += block(self._calls[inputs], seconds)

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(work, times))  # raises what a thread raised
        return {
            "milliseconds": [ns / 1e6 for mine in times for ns in mine],
            "seconds": time.perf_counter() - min(begins),
            "calls": sum(len(mine) + 1 for mine in times),  # with the one that warms up each block
        }


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
        fastest = min(block(call, WINDOW_SECONDS))
        if abs(fastest - last) < 0.05 * last:
            return
        last = fastest


def block(call: Callable[[], Any], seconds: float) -> list[int]:
    """Nanoseconds of each of the calls made within `seconds`, at least one; a call before them warms up."""
    call()
    times: list[int] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return times


def peak_memory_bytes() -> int:
    """Most resident memory that this process has had: interpreter, imported runtime, load and inference.

    On Linux from VmHWM: ru_maxrss there starts with the size of the parent that forked it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()

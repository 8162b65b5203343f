"""The parent's end of the processes that time models (optpipe.measure.worker is the other)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optpipe.errors import OptpipeError

START_SECONDS = 120.0  # an import of a runtime from a cold disk
END_SECONDS = 2.0  # for a process to end by itself


class MeasureError(OptpipeError):
    """A time could not be measured: a worker did not start, died or hung. The text holds its last words."""


class Nursery:
    """A process that has imported one runtime and forks the workers that time models in it."""

    def __init__(self, runtime: str, log_folder: Path) -> None:
        self.runtime = runtime
        self._log_folder = log_folder
        self._number = 0
        self._imported: set[str] = set()
        log_folder.mkdir(parents=True, exist_ok=True)
        # what workers leave behind, as AOTInductor's loader leaves the library that it unpacks
        self._scratch = tempfile.TemporaryDirectory(prefix="optpipe_", ignore_cleanup_errors=True)
        self._control, theirs = socket.socketpair()
        with theirs, (log_folder / f"{runtime}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "optpipe.measure.worker", runtime, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the parent, which closes its workers
                env=_environment() | {"TMPDIR": self._scratch.name},
            )
        self._control.settimeout(START_SECONDS)
        self._is_ready = False

    @property
    def has_died(self) -> bool:
        """Whether the process has ended though nobody closed it."""
        return self._process.poll() is not None

    def worker(self, timeout_seconds: float) -> Worker:
        """A fresh process. Raises MeasureError if the runtime cannot be imported."""
        if not self._is_ready:
            self._answer()
            self._is_ready = True
        self._number += 1
        log = self._log_folder / f"{self.runtime}_{self._number}.log"
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as file:
            pid = int(self._answer(b"{}", [theirs.fileno(), file.fileno()])["pid"])
        return Worker(self, pid, ours, log, timeout_seconds)

    def imports(self, modules: Sequence[str]) -> None:
        """Have modules imported that models need: 40 processes that each import a library would take a minute."""
        if new := sorted(set(modules) - self._imported):
            self._imported |= set(new)
            self._answer(json.dumps({"import": new}).encode())

    def reap(self, pid: int) -> int:
        """End the worker `pid`; its exit code. Raises MeasureError if the nursery has died."""
        return int(self._answer(json.dumps({"reap": pid}).encode())["exit"])

    def close(self) -> None:
        """End the process and its workers."""
        self._control.close()  # which ends it, and it its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=END_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # what hangs, or outlived a nursery that was killed
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()

    def _answer(self, request: bytes = b"", files: Sequence[int] = ()) -> dict[str, Any]:
        """What the process says to `request`, or first of all."""
        try:
            if request:
                socket.send_fds(self._control, [request], list(files))
            line = self._control.recv(4096)
        except OSError:  # a timeout among them
            line = b""
        if not line:
            words = last_words(self._log_folder / f"{self.runtime}.log")
            did = "died" if self._is_ready else "did not start"
            raise MeasureError(f"the process that times models in {self.runtime} {did}; its last words: {words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Worker:
    """One process with one model."""

    def __init__(self, nursery: Nursery, pid: int, channel: socket.socket, log: Path, timeout_seconds: float) -> None:
        self.peak_memory_bytes = 0
        self.cpu_seconds = 0.0
        self.nursery, self._pid, self._log, self._timeout_seconds = nursery, pid, log, timeout_seconds
        channel.settimeout(timeout_seconds)
        self._channel = channel
        self._lines = channel.makefile("rwb")
        self._exit_code: int | None = None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Have the worker do something and sleep until it has. Raises MeasureError if it dies or is silent too long."""
        try:
            self._lines.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self._lines.flush()
            line = self._lines.readline()
        except TimeoutError:
            raise self._failure(f"was silent for {self._timeout_seconds:g} s and was killed") from None
        except OSError:
            line = b""
        if not line:
            raise self._failure("died")
        answer: dict[str, Any] = json.loads(line)
        self.peak_memory_bytes = int(answer["peak_memory_bytes"])
        self.cpu_seconds = float(answer["cpu_seconds"])
        return answer

    def close(self) -> int:
        """End the process; its exit code."""
        if self._exit_code is None:
            self._channel.close()
            with contextlib.suppress(OSError):  # a line that was not sent to one that has died
                self._lines.close()
            self._exit_code = -signal.SIGKILL  # with the nursery, if that has died
            self._exit_code = self.nursery.reap(self._pid)
            if not self._log.stat().st_size:
                self._log.unlink()
        return self._exit_code

    def _failure(self, what: str) -> MeasureError:
        code = self.close()
        return MeasureError(
            f"the process that timed the model in {self.nursery.runtime} {what} (exit code {code}); "
            f"its last words: {last_words(self._log)}"
        )


def last_words(log: Path) -> str:
    """The last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "nothing"


def _environment() -> dict[str, str]:
    """The parent's environment, without what it set for its own training, and with its import path."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(sys.path)}

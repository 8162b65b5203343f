"""Latency of models against one another: isolated worker processes, paired rounds of short blocks.

Each contender runs in processes of its own, started once, and the parent sleeps while one of them works. A round is
one block of calls of every contender; ratios are formed within rounds, so that whatever slows the machine for a while
slows both sides. Intervals come from a bootstrap over worker processes and rounds (Davison & Hinkley 1997, §3.8).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpipe.errors import OptpipeError
from optpipe.machine import machine_lock
from optpipe.measure.settings import Measure
from optpipe.report.schema import Verdict

BOOTSTRAP_SAMPLES = 2000


class MeasureError(OptpipeError):
    """A worker process died or hung; the text holds its last words."""


@dataclass(frozen=True)
class Contender:
    """A saved model and what runs it."""

    folder: Path  # where its form was saved
    runtime: str
    threads: int
    twin: bool = False  # in processes of its own although another contender is equal: for the noise floor


@dataclass(frozen=True)
class Ratio:
    """Time of a reference divided by time of the subject: above 1, the subject is faster."""

    value: float
    ci95: tuple[float, float]

    def verdict(self, margin: float) -> Verdict:
        """`faster` or `slower` only where the whole interval lies beyond the margin of equivalence."""
        if self.ci95[0] > 1 + margin:
            return "faster"
        return "slower" if self.ci95[1] < 1 - margin else "same"


@dataclass(frozen=True)
class Comparison:
    """One subject timed against references in the same rounds. `ratios` is in the references' order."""

    milliseconds: NDArray[np.float64]  # every call of the subject
    ratios: list[Ratio]
    reference_milliseconds: list[NDArray[np.float64]]
    peak_memory_bytes: int


class Bench:
    """Times models against one another. Workers of references live until the bench is closed."""

    def __init__(self, settings: Measure, log_folder: Path) -> None:
        self.settings = settings
        self._log_folder = log_folder
        self._workers: dict[tuple[Contender, int], Worker] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; the next comparison starts new ones."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def compare(self, subject: Contender, references: Sequence[Contender], inputs: Path) -> Comparison:
        """Time `subject` against `references` on the batch in the .npz file `inputs`.

        Raises MeasureError if a worker dies, or is silent for longer than `timeout_seconds`.
        """
        team = [subject, *references]
        try:
            with machine_lock().timing():
                samples = self._rounds(team, inputs)
                memory = max(self._worker(subject, replica).peak_memory_bytes for replica in self._replicas())
        except MeasureError:
            self.close()  # one that died or hangs must not be asked again
            raise
        finally:
            self._close(subject, unless=references)
        medians = _medians(samples)
        return Comparison(
            milliseconds=_pooled(samples, 0),
            ratios=[_ratio(medians[:, :, i] / medians[:, :, 0]) for i in range(1, len(team))],
            reference_milliseconds=[_pooled(samples, i) for i in range(1, len(team))],
            peak_memory_bytes=memory,
        )

    def _rounds(self, team: list[Contender], inputs: Path) -> list[list[list[list[float]]]]:
        """samples[round][replica][contender] = milliseconds of each call."""
        samples: list[list[list[list[float]]]] = []
        workers = [self._worker(contender, replica) for replica in self._replicas() for contender in team]
        for worker in workers:  # they have started side by side; each warms up alone, outside the clock
            worker.block(inputs, 0.0)
        deadline = time.monotonic() + self.settings.max_seconds
        while len(samples) < self.settings.min_rounds or time.monotonic() < deadline:
            samples.append([self._round(team, replica, inputs, len(samples)) for replica in self._replicas()])
            if len(samples) >= self.settings.min_rounds and self._is_narrow(samples):
                break
        return samples

    def _replicas(self) -> range:
        return range(self.settings.replicas)

    def _round(self, team: list[Contender], replica: int, inputs: Path, number: int) -> list[list[float]]:
        """One block of each contender, in turns from the front and from the back."""
        order = range(len(team)) if number % 2 == 0 else reversed(range(len(team)))
        blocks = {i: self._worker(team[i], replica).block(inputs, self.settings.block_seconds) for i in order}
        return [blocks[i] for i in range(len(team))]

    def _is_narrow(self, samples: list[list[list[list[float]]]]) -> bool:
        medians = _medians(samples)
        ratios = [_ratio(medians[:, :, i] / medians[:, :, 0]) for i in range(1, medians.shape[2])]
        return all(r.ci95[1] - r.ci95[0] < self.settings.interval_width * r.value for r in ratios)

    def _worker(self, contender: Contender, replica: int) -> Worker:
        key = (contender, replica)
        if key not in self._workers:
            log = self._log_folder / f"worker_{len(self._workers)}.log"
            self._workers[key] = Worker(contender, log, self.settings.timeout_seconds)
        return self._workers[key]

    def _close(self, subject: Contender, unless: Sequence[Contender]) -> None:
        if subject not in unless:
            for replica in self._replicas():
                if worker := self._workers.pop((subject, replica), None):
                    worker.close()


class Worker:
    """The parent's end of one measuring process."""

    def __init__(self, contender: Contender, log: Path, timeout_seconds: float) -> None:
        self.contender = contender
        self.peak_memory_bytes = 0
        self._timeout_seconds = timeout_seconds
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "optpipe.measure.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the parent, which closes its workers
                env=_environment(contender.threads),
            )
        self._is_ready = False

    def block(self, inputs: Path, seconds: float) -> list[float]:
        """Milliseconds of each call made within `seconds`, at least three."""
        if not self._is_ready:
            self._ask(runtime=self.contender.runtime, folder=str(self.contender.folder), threads=self.contender.threads)
            self._is_ready = True
        answer = self._ask(inputs=str(inputs), seconds=seconds)
        self.peak_memory_bytes = int(answer["peak_memory_bytes"])
        times: list[float] = answer["milliseconds"]
        return times

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("died") from None
        readable, _, _ = select.select([self._process.stdout], [], [], self._timeout_seconds)
        if not readable:
            self._process.kill()
            raise self._failure(f"was silent for {self._timeout_seconds:g} s and was killed")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("died")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> MeasureError:
        code = self._process.wait()
        last_words = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        return MeasureError(
            f"the process that timed the model in {self.contender.runtime} {what} (exit code {code}); "
            f"its last words: {last_words[0]}"
        )


def _environment(threads: int) -> dict[str, str]:
    """The parent's environment, without what it set for its own training, and with its import path."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return {**inherited, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)}


def _medians(samples: list[list[list[list[float]]]]) -> NDArray[np.float64]:
    """Median of every block, shape (replicas, rounds, contenders)."""
    medians = [[[float(np.median(calls)) for calls in team] for team in replicas] for replicas in samples]
    return np.asarray(medians).swapaxes(0, 1)


def _pooled(samples: list[list[list[list[float]]]], contender: int) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(team[contender]) for replicas in samples for team in replicas])


def _ratio(ratios: NDArray[np.float64]) -> Ratio:
    """Median of `ratios`, shape (replicas, rounds), with a 95 % bootstrap interval over both axes."""
    replicas, rounds = ratios.shape
    rng = np.random.default_rng(0)  # the interval of given samples is always the same
    who = rng.integers(replicas, size=(BOOTSTRAP_SAMPLES, replicas, 1))
    when = rng.integers(rounds, size=(BOOTSTRAP_SAMPLES, replicas, rounds))
    medians = np.median(ratios[who, when].reshape(BOOTSTRAP_SAMPLES, -1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), (float(low), float(high)))

"""Context: what a stage may see and use while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optpipe.progress import track
from optpipe.report.schema import Attempt, Callers, Latency, Measurement, NotMeasured, Sustained, Table
from optpipe.target import Target

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from optpipe.measure.measurer import Measurer
    from optpipe.task import Task

T = TypeVar("T")


@dataclass
class Benchmarks:
    """What a stage had timed beyond the figures of every step."""

    grid: list[Latency] = field(default_factory=list)
    callers: list[Callers] = field(default_factory=list)
    sustained: Sustained | None = None
    engine: str = ""  # that was chosen to run the model
    in_engine: Measurement | None = None  # the model there

    def __bool__(self) -> bool:
        return bool(self.grid or self.callers or self.sustained or self.in_engine)

    def added_to(self, measurement: Measurement) -> Measurement:
        """`measurement`, or that in the engine that was chosen, with what was timed."""
        measurement = self.in_engine or measurement
        if self.grid:
            measurement = measurement.with_grid(self.grid)
        if self.sustained:
            measurement = replace(measurement, sustained=self.sustained)
        return replace(measurement, callers=self.callers or measurement.callers)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Frozen and small. It holds neither the configuration nor the tracker nor another stage's results."""

    dir: Path  # this step's own folder
    task: Task
    target: Target
    baseline: nn.Module  # the model as it came in; never written to
    device: str  # to train on: "cpu", "cuda", "cuda:1"
    seed: int  # of this step; torch's generator was seeded with it
    measurer: Measurer
    engine: str = ""  # that was chosen before to run the model
    benchmarks: Benchmarks = field(default_factory=Benchmarks)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    choose_engine: Callable[[Any, Sequence[str], Benchmarks], None] | None = None
    partial: Path | None = None  # a folder that outlives a run which is killed, if there is one

    @property
    def _engine(self) -> str:
        return self.benchmarks.engine or self.engine

    @property
    def checkpoints(self) -> Path:
        """Where to keep the state of a training while it goes on."""
        return self.partial or self.dir

    def record(self, **facts: Any) -> None:
        """Keep facts for the report: numbers, strings, or lists of them."""
        self.facts.update(facts)

    def note(self, text: str) -> None:
        """Keep a sentence for the report."""
        self.notes.append(text)

    def attempt(self, method: str, *, ok: bool, seconds: float, reason: str = "") -> None:
        """Keep one of several ways that were tried for the report: whether it worked, or why it did not."""
        self.attempts.append(Attempt(method=method, ok=ok, reason=reason, seconds=seconds, chosen=ok))

    def computes_in(self, precision: str) -> None:
        """Say that the result computes in less than what was given, in "half" or "int8"; parity allows for it."""
        self.precisions.append(precision)

    def table(self, table: Table) -> None:
        """Keep a table for the report, which draws the columns that it names."""
        self.tables.append(table)

    def time(self, model: Any, batch_sizes: Sequence[int], threads: Sequence[int]) -> list[Latency]:
        """Time `model`, of any form, against the baseline on a grid in the target's runtime; the report shows it.

        Points that cannot be measured are left out, with a note that says why; all of them, where this machine cannot
        run what is placed for the target.
        """
        if not self._can_time():
            return []
        found = self.measurer.latencies(model, self.dir, batch_sizes, threads, self._engine)
        for point in found:
            if isinstance(point, NotMeasured):
                self.note(f"not measured, {point.not_measured}")
        self.benchmarks.grid += [point for point in found if not isinstance(point, NotMeasured)]
        return self.benchmarks.grid

    def time_engines(self, model: Any, names: Sequence[str]) -> None:
        """Time `model`, a file, in each of the engines; the fastest inside the budget will run it from here on."""
        if self.choose_engine is not None and self._can_time():
            self.choose_engine(model, names, self.benchmarks)

    def time_callers(self, model: Any, counts: Sequence[int]) -> list[Callers]:
        """Time `model` at batch 1 under `counts` threads that call it at once; empty as for `time`."""
        if not (counts and self._can_time()):
            return []
        found = self.measurer.callers(model, self.dir, counts, self._engine)
        self.benchmarks.callers.extend(found)
        return found

    def time_sustained(self, model: Any, seconds: float) -> Sustained | None:
        """Time `model` at batch 1 over `seconds` without a pause; None as for `time`."""
        if not (seconds and self._can_time()):
            return None
        self.benchmarks.sustained = self.measurer.sustained(model, self.dir, seconds, self._engine)
        return self.benchmarks.sustained

    def _can_time(self) -> bool:
        said = f"nothing was timed: {self.target.elsewhere()}"
        if not self.target.is_host and said not in self.notes:
            self.note(said)
        return self.target.is_host

    def progress(self, steps: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """`steps`, with a progress bar while they are consumed."""
        return track(steps, description, total)

    @cached_property
    def fabric(self) -> Fabric:
        """Lightning Fabric on `device`."""
        from lightning_fabric import Fabric

        kind, _, index = self.device.partition(":")
        return Fabric(accelerator=kind, devices=[int(index)] if index else 1)

"""Latency of models against one another: fresh, isolated processes, paired rounds of short blocks.

A replica is a fresh process of every contender. In a round each has a turn, a block of calls, while the parent sleeps;
ratios are formed within a round, so that whatever slows the machine for a while slows both sides. The rounds of several
replicas are interleaved: a neighbour that slows this machine for half a second then spoils a round of each, which the
median over rounds forgives, rather than all rounds of one. Replicas are added until the intervals are narrow or the
time is up.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from optpipe.machine import bound_cores, machine_lock
from optpipe.measure import energy
from optpipe.measure.nursery import Nursery, Worker
from optpipe.measure.settings import Measure
from optpipe.measure.statistics import Floats, Ratio, drift
from optpipe.progress import stepwise
from optpipe.report.schema import Callers, NotMeasured, Sustained

CALLERS_SECONDS = 0.25
SPANS = 6  # that a sustained measurement is told in
DRIFT = 0.1  # of a model's time within a replica: more is not settled
VISIBLE_LOAD_CORES = 0.1
LOOK_SECONDS = 0.1  # at how busy each core is
MEMORY_SHARE = 0.5  # of what is free, for the replicas that are loaded at once


@dataclass(frozen=True)
class Contender:
    """A saved model and what runs it."""

    folder: Path  # where its form was saved
    runtime: str
    threads: int
    form: str = ""  # by default the first that the runtime takes
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)  # of the runtime


@dataclass
class Comparison:
    """A team of contenders timed on one batch. Indices are those of the team."""

    team: list[Contender]
    blocks: list[list[list[Floats]]] = field(default_factory=list)  # [replica][contender][round] ms of each call
    load_ms: list[list[float]] = field(default_factory=list)  # [replica][contender]
    first_call_ms: list[list[float]] = field(default_factory=list)  # [replica][contender]
    peak_memory_bytes: list[int] = field(default_factory=list)  # [contender]
    changes: list[float] = field(default_factory=list)  # of the first contender's time, in each cohort; 1 if settled
    other_load_cores: float = 0.0
    problem: str = ""  # why its ratios are no figures

    def milliseconds(self, contender: int) -> Floats:
        """Every call of one contender, pooled."""
        return np.concatenate([block for replica in self.blocks for block in replica[contender]])

    def medians(self, contender: int) -> Floats:
        """The median time of every block, shape (replicas, rounds)."""
        return medians(self.blocks, contender)

    def ratio(self, subject: int, reference: int) -> Ratio:
        """How many times faster the subject is than the reference."""
        return Ratio.of(self.medians(reference), self.medians(subject))

    def ratios(self) -> list[Ratio]:
        """Those of the first contender against each of the others."""
        return [self.ratio(0, reference) for reference in range(1, len(self.team))]

    def save(self, path: Path, names: Sequence[str], contenders: Sequence[int] = ()) -> None:
        """Every call's time and the number of its replica: arrays `<name>` and `<name>_replica` of an .npz file.

        contenders: those that have the names; by default the first ones.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for i, name in zip(contenders or range(len(names)), names, strict=True):
            counts = [sum(map(len, replica[i])) for replica in self.blocks]
            arrays[name] = self.milliseconds(i)
            arrays[f"{name}_replica"] = np.repeat(np.arange(len(counts)), counts)
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def medians(blocks: list[list[list[Floats]]], contender: int) -> Floats:
    """The median time of every block of one contender, shape (replicas, rounds)."""
    return np.asarray([[float(np.median(block)) for block in replica[contender]] for replica in blocks])


def change_within(blocks: list[list[list[Floats]]]) -> float:
    """How the time of the first contender, as a share of the last one's, changed from the first rounds to the last."""
    return drift(medians(blocks, 0) / medians(blocks, len(blocks[0]) - 1))


def lasting_change(first: list[list[list[Floats]]], again: list[list[list[Floats]]]) -> float:
    """The change within `again` that goes on with one since `first`; 1 where they do not agree.

    What a model does goes on in one direction; what the machine does to all processes at once passes.
    """
    times = [medians(blocks, 0) / medians(blocks, len(blocks[0]) - 1) for blocks in (first, again)]
    since = drift(np.stack([np.median(ratios, axis=1) for ratios in times], axis=1))
    within = drift(times[1])
    return _nearest_to_1([since, within]) if (since > 1) == (within > 1) else 1.0


def _nearest_to_1(changes: Sequence[float]) -> float:
    return min(changes, key=lambda change: abs(np.log(change)), default=1.0)


def _is_settled(change: float) -> bool:
    return bool(abs(np.log(change)) <= DRIFT)


class Bench:
    """Times models against one another. Nurseries, one per runtime, live until the bench is closed."""

    def __init__(self, settings: Measure, log_folder: Path) -> None:
        self.settings = settings
        self._log_folder = log_folder
        self._nurseries: dict[str, Nursery] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for nursery in self._nurseries.values():
            nursery.close()
        self._nurseries.clear()

    def prepare(self, runtimes: Sequence[str]) -> None:
        """Start importing `runtimes`, so that nobody waits for it later."""
        for runtime in runtimes:
            self._nursery(runtime)

    def compare(self, team: Sequence[Contender], batches: Sequence[Path], what: str = "timing") -> list[Comparison]:
        """Time the contenders against one another on each batch, an .npz file; one comparison per batch.

        Replicas are added until the first contender's ratios to the others are known to `interval_width`. A comparison
        whose first contender does not settle, or on which the machine is too noisy to tell a ratio, says so in its
        `problem`. Raises MeasureError if a worker dies or is silent for `timeout_seconds`.
        """
        found = [Comparison(list(team)) for _ in batches]
        with machine_lock().timing(), stepwise(what) as step:
            load = OtherLoad()
            deadline = time.monotonic() + self.settings.max_seconds
            count = self.settings.replicas
            while not self._is_enough(found, deadline):
                cores = _quiet_cores(max(contender.threads for contender in team))
                with ExitStack() as stack:
                    cohort: list[list[Worker]] = []
                    while len(cohort) < count and _fits_in_memory(cohort):
                        cohort.append([stack.enter_context(closing(self._worker(contender))) for contender in team])
                        self._load(cohort[-1], cores, batches, found)
                        step()
                    for comparison, batch in zip(found, batches, strict=True):
                        self._rounds(cohort, batch, comparison)
                    load.ours += sum(worker.cpu_seconds for workers in cohort for worker in workers)
                count = max(2, self.settings.replicas // 2)
        for comparison in found:
            comparison.other_load_cores = load.cores()
            comparison.problem = self._problem(comparison)
        return found

    @contextmanager
    def evaluator(self, contender: Contender) -> Iterator[Callable[..., Any]]:
        """A model as a callable on torch tensors, in a process of its own. Raises MeasureError if that dies."""
        import torch

        with closing(self._worker(contender)) as worker, tempfile.TemporaryDirectory() as folder:
            worker.ask("load", **_to_load(contender))
            inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"

            def model(*args: Any, **kwargs: Any) -> Any:
                named = {
                    **{str(i): tensor.numpy() for i, tensor in enumerate(args)},
                    **{k: v.numpy() for k, v in kwargs.items()},
                }
                np.savez(inputs, **named)  # type: ignore[arg-type]
                worker.ask("run", inputs=str(inputs), outputs=str(outputs))
                with np.load(outputs) as arrays:
                    found = tuple(torch.from_numpy(arrays[str(i)]) for i in range(len(arrays)))
                return found[0] if len(found) == 1 else found

            yield model

    def callers(self, contender: Contender, batch: Path, batch_size: int, counts: Sequence[int]) -> list[Callers]:
        """Throughput and latency of one model under 1, 2, … threads that call it at once."""
        found = []
        with machine_lock().timing(), closing(self._worker(contender)) as worker:
            _load(worker, contender, [batch])
            for count in counts:
                answer = worker.ask("callers", inputs=str(batch), seconds=CALLERS_SECONDS, count=count)
                p50, p95 = np.percentile(answer["milliseconds"], [50, 95])
                throughput = answer["calls"] * batch_size / answer["seconds"]
                found.append(Callers(callers=count, throughput=throughput, p50_ms=float(p50), p95_ms=float(p95)))
        return found

    def energy(self, contender: Contender, batch: Path, seconds: float) -> float | NotMeasured:
        """Joules of a call of one model, from calling it for `seconds`; or why they cannot be known."""
        with machine_lock().timing(), closing(self._worker(contender)) as worker:
            _load(worker, contender, [batch])  # neither loading nor waiting for the machine is the model's energy
            return energy.joules_per_call(
                lambda: len(worker.ask("block", inputs=str(batch), seconds=seconds)["milliseconds"]) + 1
            )

    def sustained(self, contender: Contender, batch: Path, seconds: float) -> Sustained:
        """One model called without a pause for `seconds`."""
        medians: list[float] = []
        with machine_lock().timing(), closing(self._worker(contender)) as worker, stepwise("sustained load") as step:
            _load(worker, contender, [batch])
            begin = time.monotonic()
            for _ in range(SPANS):
                answer = worker.ask("block", inputs=str(batch), seconds=seconds / SPANS)
                medians.append(float(np.median(answer["milliseconds"])))
                step()
        return Sustained(seconds=time.monotonic() - begin, p50_ms=medians, drift=medians[-1] / medians[0])

    def _load(self, workers: list[Worker], cores: list[int], batches: Sequence[Path], found: list[Comparison]) -> None:
        """Load a replica's models and warm them up."""
        team = found[0].team
        loads = [_load(worker, contender, batches, cores) for worker, contender in zip(workers, team, strict=True)]
        for i, comparison in enumerate(found):
            comparison.load_ms.append([load for load, _ in loads])
            comparison.first_call_ms.append([first[i] for _, first in loads])

    def _rounds(self, cohort: list[list[Worker]], batch: Path, comparison: Comparison) -> None:
        """Add the blocks of a cohort; those of models that were still warming up are taken again, once."""
        blocks = self._turns(cohort, batch)
        change = 1.0
        if not _is_settled(change_within(blocks)):
            first, blocks = blocks, self._turns(cohort, batch)
            change = lasting_change(first, blocks)
        comparison.changes.append(change)
        comparison.blocks += blocks
        peaks = [[worker.peak_memory_bytes for worker in workers] for workers in cohort]
        comparison.peak_memory_bytes = [max(of_one) for of_one in zip(*peaks, strict=True)]

    def _turns(self, cohort: list[list[Worker]], batch: Path) -> list[list[list[Floats]]]:
        """Blocks in turns, from the front and from the back, [replica][contender][round]."""
        blocks: list[list[list[Floats]]] = [[[] for _ in workers] for workers in cohort]
        for number in range(self.settings.rounds):
            for replica, workers in enumerate(cohort):
                order = range(len(workers)) if (number + replica) % 2 == 0 else reversed(range(len(workers)))
                for i in order:
                    answer = workers[i].ask("block", inputs=str(batch), seconds=self.settings.block_seconds)
                    blocks[replica][i].append(np.asarray(answer["milliseconds"]))
        return blocks

    def _is_enough(self, found: list[Comparison], deadline: float) -> bool:
        if len(found[0].blocks) < self.settings.replicas:
            return False
        width = max((ratio.width for comparison in found for ratio in comparison.ratios()), default=0.0)
        return width < self.settings.interval_width or time.monotonic() > deadline

    def _problem(self, comparison: Comparison) -> str:
        """Why the ratios of `comparison` are no figures; empty if they are."""
        widest = max((ratio.width for ratio in comparison.ratios()), default=0.0)
        if widest > self.settings.noise_limit:
            return (
                f"the machine is too noisy: after {len(comparison.blocks)} processes the 95 % interval of the ratio is "
                f"{widest:.0%} wide, above measure.noise_limit={self.settings.noise_limit:g}; {_remedy(comparison)}"
            )
        change = _nearest_to_1(comparison.changes)
        if not _is_settled(change):
            return (
                f"the model's time does not settle: within {self.settings.rounds} rounds it became {change:.2f} times "
                "what it was, in every process; look for state that grows from call to call"
            )
        return ""

    def _worker(self, contender: Contender) -> Worker:
        return self._nursery(contender.runtime).worker(self.settings.timeout_seconds)

    def _nursery(self, runtime: str) -> Nursery:
        if runtime in self._nurseries and self._nurseries[runtime].has_died:
            self._nurseries.pop(runtime).close()
        if runtime not in self._nurseries:
            self._nurseries[runtime] = Nursery(runtime, self._log_folder)
        return self._nurseries[runtime]


def _remedy(comparison: Comparison) -> str:
    """Of noise: end what makes it, if that can be seen, or average over more of it."""
    more = f"raise measure.max_seconds, or measure.replicas above {len(comparison.blocks)}"
    if comparison.other_load_cores < VISIBLE_LOAD_CORES:
        return f"no other program was to be seen here; {more}"
    return f"other programs kept {comparison.other_load_cores:.1f} of {bound_cores()} cores busy; end them, or {more}"


def _quiet_cores(count: int) -> list[int]:
    """The cores that are least busy now, for all contenders of a cohort; empty where there is no choice.

    They share them: of two virtual cores one can be half as fast for a second while a neighbour uses its other half,
    and a contender that happened to stay there would look slow. They stay on them: a busy process then moves to the
    others, and remains there.
    """
    import psutil

    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if count >= len(usable):
        return []
    busy = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
    return sorted(usable, key=lambda core: busy[core])[:count]


def _fits_in_memory(cohort: list[list[Worker]]) -> bool:
    """Whether one more replica can be loaded beside those of `cohort`."""
    import psutil

    if not cohort:
        return True
    needed = sum(worker.peak_memory_bytes for worker in cohort[0])
    return bool(needed < MEMORY_SHARE * psutil.virtual_memory().available)


class OtherLoad:
    """How busy the machine is with what is not ours."""

    def __init__(self) -> None:
        self.ours = 0.0  # seconds of processor time that our workers used
        self._begin, self._busy, self._own = time.monotonic(), _busy_seconds(), sum(os.times()[:2])

    def cores(self) -> float:
        """Cores that others kept busy since the start, on average."""
        others = _busy_seconds() - self._busy - (sum(os.times()[:2]) - self._own) - self.ours
        return max(0.0, others / (time.monotonic() - self._begin))


def _busy_seconds() -> float:
    """Processor time of everything on the machine, hypervisor's steal included."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _to_load(contender: Contender) -> dict[str, Any]:
    """What a worker must know to load it."""
    return {
        "folder": str(contender.folder),
        "form": contender.form,
        "threads": contender.threads,
        "device": contender.device,
        "options": contender.options,
    }


def _load(
    worker: Worker, contender: Contender, batches: Sequence[Path], cores: Sequence[int] = ()
) -> tuple[float, list[float]]:
    """Load the model and warm it up on every batch: milliseconds of loading, and of the first call on each."""
    answer = worker.ask("load", **_to_load(contender), cores=list(cores))
    worker.nursery.imports(answer["modules"])
    load = answer["load_ms"]
    return load, [worker.ask("warm_up", inputs=str(batch))["first_call_ms"] for batch in batches]

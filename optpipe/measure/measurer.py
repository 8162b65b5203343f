"""Measurer: the figures of every step of a run, all against the same baseline."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from optpipe import lower
from optpipe.errors import StageError
from optpipe.forms import form, form_of
from optpipe.machine import machine_lock
from optpipe.measure.latency import Bench, Comparison, Contender, MeasureError, Ratio
from optpipe.measure.quality import Scores, delta_interval, interval
from optpipe.measure.settings import Measure
from optpipe.report import Latency, Measurement, NotMeasured, Quality
from optpipe.runtimes import runtime
from optpipe.target import Target
from optpipe.task import Inputs, Task, batch_of


class Measurer:
    """Measures models against the baseline that it was made with.

    folder: holds the saved baseline, the batches that are timed and the workers' logs.
    seconds: time spent on measuring and previews so far.
    """

    def __init__(self, task: Task, target: Target, settings: Measure, folder: Path, bench: Bench) -> None:
        self.task, self.target, self.settings = task, target, settings
        self.seconds = 0.0
        self._folder, self._bench = folder, bench
        self._timed: dict[tuple[Any, ...], tuple[Latency, int]] = {}
        self._baseline = Contender(folder, "torch", target.threads)
        self._baseline_exported: Path | NotMeasured = NotMeasured("the baseline was not exported")
        self._scores: dict[str, Scores] = {}

    def baseline(self, model: nn.Module) -> Measurement:
        """Measure `model` as it came in, and exported unoptimised to the target's runtime; the rest compares to it."""
        with self._clock():
            form("torch").save(model, self._folder)
            self._scores = {split: self._evaluate(model, split) for split in ("test", "validation")}
            exported = self._folder / "exported"
            exported.mkdir(exist_ok=True)
            try:
                self._lower(model, exported, rewrite=False)
                self._baseline_exported = exported
            except StageError as error:
                self._baseline_exported = NotMeasured(f"the unoptimised baseline cannot be exported: {error}")
            twin = replace(self._baseline, twin=True)  # the baseline against itself: the noise floor
            latency = self._latencies_or_reason([twin, *self._exported_contenders(self.target.threads)])
            return Measurement(
                size_bytes=form("torch").size_bytes(self._folder),
                quality=self._quality(self._scores["test"]),
                latency=latency[0] if isinstance(latency, tuple) else latency,
                peak_memory_bytes=latency[1] if isinstance(latency, tuple) else latency,
            )

    def measure(self, model: Any, folder: Path) -> Measurement:
        """Figures of `model`, whose form was saved to `folder`; size and latency of a preview if it is no file yet."""
        with self._clock():
            latency: tuple[list[Latency], int] | NotMeasured
            try:
                contender, preview = self._contender(model, folder, self.target.threads)
                latency = self._latencies_or_reason([contender], preview=preview)
                size: int | NotMeasured = form(runtime(contender.runtime).TAKES).size_bytes(contender.folder)
            except StageError as error:
                latency = size = NotMeasured(f"no preview of this model can be exported: {error}")
            return Measurement(
                size_bytes=size,
                quality=self._quality(self._evaluate(model, "test")),
                latency=latency[0] if isinstance(latency, tuple) else latency,
                peak_memory_bytes=latency[1] if isinstance(latency, tuple) else latency,
            )

    def validation_drop(self, model: Any) -> float:
        """How much quality `model` lost against the baseline on the validation split, as a fraction."""
        with self._clock():
            drop = float(self._scores["validation"].mean() - self._evaluate(model, "validation").mean())
        return drop if self.task.metric.higher_is_better else -drop

    def latencies(self, model: Any, folder: Path, batch_sizes: Sequence[int], threads: Sequence[int]) -> list[Latency]:
        """`model` against the baseline on a grid, in the target's runtime. Raises MeasureError or StageError."""
        with self._clock():
            current = form_of(model)
            assert current is not None
            current.save(model, folder)
            grid = [(count, size) for count in threads for size in batch_sizes]
            return [self._latency(*self._contender(model, folder, count), size)[0] for count, size in grid]

    def _contender(self, model: Any, folder: Path, threads: int) -> tuple[Contender, bool]:
        """The saved model, or a preview of it, as the target runs it, and whether it is a preview."""
        engine = runtime(self.target.runtime)
        current = form_of(model)
        if current is not None and current.NAME == engine.TAKES:
            return Contender(folder, self.target.runtime, threads), False
        preview = folder / "preview"
        if not (preview.exists() and any(preview.iterdir())):
            preview.mkdir(exist_ok=True)
            self._lower(model, preview, rewrite=True)
        return Contender(preview, self.target.runtime, threads), True

    def _lower(self, model: Any, folder: Path, *, rewrite: bool) -> None:
        """Write `model` to `folder` in the form that the target's runtime takes."""
        takes = runtime(self.target.runtime).TAKES
        current = form_of(model)
        if current is not None and current.NAME == takes:
            current.save(model, folder)
            return
        with machine_lock().working():
            program = lower.trace(model, self.task) if isinstance(model, nn.Module) else model
            lower.to_onnx(
                program,
                folder / "model.onnx",
                input_names=self.task.input_names,
                output_names=self.task.output_names,
                rewrite=rewrite,
            )

    def _exported_contenders(self, threads: int) -> list[Contender]:
        """The unoptimised baseline in the target's runtime; none if that is eager PyTorch, or it has no export."""
        if self.target.runtime == "torch" or isinstance(self._baseline_exported, NotMeasured):
            return []
        return [Contender(self._baseline_exported, self.target.runtime, threads)]

    def _latencies_or_reason(
        self, contenders: Sequence[Contender], preview: bool = False
    ) -> tuple[list[Latency], int] | NotMeasured:
        if not self.target.is_host:
            return NotMeasured(self.target.elsewhere())
        try:
            timed = [self._latency(contender, preview, 1) for contender in contenders]
        except MeasureError as error:
            return NotMeasured(str(error))
        return [latency for latency, _ in timed], timed[0][1]

    def _latency(self, subject: Contender, preview: bool, batch_size: int) -> tuple[Latency, int]:
        """Time one contender, unless one with the same bytes was timed in this run."""
        key = (_file_hash(subject), subject.runtime, subject.threads, subject.twin, batch_size)
        if key not in self._timed:
            eager = replace(self._baseline, threads=subject.threads)
            references = [eager, *self._exported_contenders(subject.threads)]
            if subject in references:
                subject = replace(subject, twin=True)
            comparison = self._bench.compare(subject, references, self._inputs(batch_size))
            self._timed[key] = self._summary(comparison, subject, batch_size), comparison.peak_memory_bytes
        latency, memory = self._timed[key]
        return replace(latency, preview=preview), memory

    def _summary(self, comparison: Comparison, subject: Contender, batch_size: int) -> Latency:
        times = comparison.milliseconds
        p50, p95 = np.percentile(times, [50, 95])
        speedup, *same = comparison.ratios
        missing = self._baseline_exported
        if not same and self.target.runtime == "torch":
            same = [speedup]
        same_runtime: Ratio | NotMeasured = same[0] if same else missing  # type: ignore[assignment]
        return Latency(
            runtime=subject.runtime,
            batch_size=batch_size,
            threads=subject.threads,
            p50_ms=float(p50),
            p95_ms=float(p95),
            std_ms=float(times.std(ddof=1)),
            throughput=batch_size / float(times.mean()) * 1000,
            speedup=speedup.value,
            speedup_ci95=speedup.ci95,
            speedup_same_runtime=same_runtime if isinstance(same_runtime, NotMeasured) else same_runtime.value,
            speedup_same_runtime_ci95=same_runtime if isinstance(same_runtime, NotMeasured) else same_runtime.ci95,
            verdict=speedup.verdict(self.settings.margin),
            calls=len(times),
        )

    def _quality(self, scores: Scores) -> Quality:
        base = self._scores["test"]
        return Quality(
            metric=self.task.metric.name,
            value=float(scores.mean()),
            ci95=interval(scores),
            n=len(scores),
            delta=float(scores.mean() - base.mean()),
            delta_ci95=delta_interval(scores, base),
        )

    def _evaluate(self, model: Any, split: Any) -> Scores:
        current = form_of(model)
        assert current is not None
        with machine_lock().working():
            scores: Scores = self.task.evaluate(current.as_callable(model), split).numpy()
        return scores

    def _inputs(self, batch_size: int) -> Path:
        """The .npz file of the first `batch_size` validation samples."""
        path = self._folder / f"inputs_{batch_size}.npz"
        if not path.exists():
            inputs, _ = next(iter(self.task.validation))
            np.savez(path, **_named(batch_of(inputs, batch_size)))  # type: ignore[arg-type]
        return path

    @contextmanager
    def _clock(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin


def _named(inputs: Inputs) -> dict[str, Any]:
    """Arrays by name; by number where they go in by position."""
    if isinstance(inputs, dict):
        return {name: tensor.numpy() for name, tensor in inputs.items()}
    return {str(i): tensor.numpy() for i, tensor in enumerate(inputs if isinstance(inputs, tuple) else (inputs,))}


def _file_hash(contender: Contender) -> str:
    """Of the bytes that the contender runs; a folder's name where the format is not a file of its own."""
    file = contender.folder / "model.onnx"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else str(contender.folder)

"""Measurer: the figures of every step of a run, all against the same baseline."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from optpipe import lower
from optpipe.artifact import Artifact
from optpipe.errors import StageError
from optpipe.forms import SPOKEN, Form, compressed_bytes, form, form_of
from optpipe.machine import machine_lock
from optpipe.measure import child, energy, explain, quality, roofline
from optpipe.measure.inspect import Inspection, inspect
from optpipe.measure.latency import Bench, Comparison, Contender
from optpipe.measure.nursery import MeasureError
from optpipe.measure.settings import Measure
from optpipe.measure.statistics import Ratio
from optpipe.predictions import Predictions
from optpipe.progress import say
from optpipe.report import Callers, Latency, Measurement, NotMeasured, Quality, Roofline, Sustained
from optpipe.runtimes import IN_PROCESS, RUNTIMES, all_threads, as_model, engine_of, make_runner, runtime
from optpipe.target import Target
from optpipe.task import Inputs, Split, Task, batch_of

if TYPE_CHECKING:
    from optpipe.reuse import Reuse

T = TypeVar("T")

SAMPLES = "samples"
QUALITY = "quality"
PROFILE = "profile"
ENERGY_SECONDS = 1.0  # of calls, between two readings of the counter
MOST_JUDGED = 8  # predictions kept at once, beside the baseline's
UNFUSED = {"graph_level": "basic"}  # of ONNX Runtime's own optimisations
NAMES = ("eager", "exported")  # of the baseline's two contenders


@dataclass(frozen=True)
class Timed:
    """What one comparison said of one contender."""

    latency: Latency | NotMeasured
    peak_memory_bytes: int | NotMeasured

    @classmethod
    def nothing(cls, reason: str) -> Timed:
        """Of a contender that could not be run."""
        return cls(NotMeasured(reason), NotMeasured(reason))

    def latencies(self, *, preview: bool = False) -> list[Latency] | NotMeasured:
        """Of a report's measurement."""
        return self.latency if isinstance(self.latency, NotMeasured) else [replace(self.latency, preview=preview)]


class Measurer:
    """Measures models against the baseline that it was made with.

    run_folder: the run's; `00_baseline` in it holds the saved baseline and the batches that are timed, `samples` the
    time of every call.
    reuse: what was measured before and need not be again; without it everything is measured.
    seconds: time spent on measuring and previews so far.
    """

    def __init__(
        self,
        task: Task,
        target: Target,
        settings: Measure,
        run_folder: Path,
        bench: Bench,
        reuse: Reuse | None = None,
    ) -> None:
        self.task, self.target, self.settings = task, target, settings
        self.seconds = 0.0
        self._run_folder, self._folder, self._bench, self._reuse = run_folder, run_folder / "00_baseline", bench, reuse
        self._timed: dict[tuple[Any, ...], Timed] = {}
        self._seen: dict[str, Inspection] = {}  # by the content of the file
        self._baseline = Contender(self._folder, "torch", target.threads)
        self._unoptimised: dict[str, Path | NotMeasured] = {}  # the baseline, by the form that it was lowered to
        self._reference: dict[Split, Predictions] = {}
        self._judged: dict[tuple[str, str, Split], Predictions] = {}  # the latest, by the content of the model

    def close(self) -> None:
        """End the processes that timed."""
        with self._clock():
            self._bench.close()

    def baseline(self, artifact: Artifact) -> Measurement:
        """Measure the model as it came in, saved in `00_baseline`, and exported unoptimised to the target's runtime.

        Everything that is measured later is compared with it.
        """
        with self._clock():
            as_it_came = self._as_it_is(self._folder, artifact.form.NAME, self.target.threads)
            self._baseline, self._original = replace(as_it_came, options={}), artifact
            return self._figures("baseline", {}, lambda: self._measured_baseline(artifact))

    def _measured_baseline(self, artifact: Artifact) -> Measurement:
        if self.target.is_host:  # imported while the model is judged and exported
            self._bench.prepare(list(dict.fromkeys([self._baseline.runtime, self.target.runtime])))
        self._reference_of("test"), self._reference_of("validation")
        eager, *others = self._baseline_against_itself()
        timed = [entry.latency for entry in (eager, *others)]
        lost = next((latency for latency in timed if isinstance(latency, NotMeasured)), None)
        return Measurement(
            size_bytes=artifact.form.size_bytes(self._folder),
            compressed_bytes=compressed_bytes(artifact.form, self._folder),
            quality=self._quality(self._reference_of("test")),
            latency=lost or [latency for latency in timed if isinstance(latency, Latency)],
            peak_memory_bytes=eager.peak_memory_bytes,
            threads=self.target.threads,
        )

    def measure(self, artifact: Artifact, engine: str = "", *, explain: bool = False) -> Measurement:
        """Figures of a model in `engine` or the one that will run it; size and latency of a preview if it is no file.

        explain: look for what keeps it from being faster, where it is not.
        """
        with self._clock():
            what = {"hash": artifact.hash, "form": artifact.form.NAME, "engine": engine, "explain": explain}
            return self._figures("model", what, lambda: self._measured(artifact, engine, explain))

    def _measured(self, artifact: Artifact, engine: str, explain: bool) -> Measurement:
        size: int | NotMeasured
        compressed: int | NotMeasured
        preview = False
        try:
            if self._is_previewed(artifact.form) and not self.settings.previews:
                raise StageError("measure.previews=false")
            contender, preview = self._contender(artifact, self.target.threads, engine)
            (timed,) = self._time(contender, [1], artifact.folder.name)
            shipped = form(contender.form)
            size = shipped.size_bytes(contender.folder)
            compressed = compressed_bytes(shipped, contender.folder)
        except StageError as error:
            timed = Timed.nothing(f"no preview of this model was exported: {error}")
            size = compressed = NotMeasured(f"no preview of this model was exported: {error}")
        found = Measurement(
            size_bytes=size,
            compressed_bytes=compressed,
            quality=self._quality(self._predict(artifact, "test", engine)),
            latency=timed.latencies(preview=preview),
            peak_memory_bytes=timed.peak_memory_bytes,
            threads=self.target.threads,
        )
        headline = found.headline()
        if explain and headline and headline.verdict_same_runtime != "faster":
            return self._explained(found, artifact)
        return found

    def validation(self, artifact: Artifact, engine: str = "") -> Predictions:
        """A model on the validation split, which limits are judged on; in `engine`, or the one that will run it."""
        with self._clock():
            return self._predict(artifact, "validation", engine)

    @property
    def validation_baseline(self) -> Predictions:
        """The baseline on the validation split."""
        with self._clock():
            return self._reference_of("validation")

    def _reference_of(self, split: Split) -> Predictions:
        """The baseline on `split`."""
        if split not in self._reference:
            self._reference[split] = self._predict(self._original, split)
        return self._reference[split]

    def save_quality(self, artifact: Artifact, engine: str = "") -> None:
        """Keep how the baseline and the run's result did on each test sample, in the run's folder."""
        with self._clock():
            folder = self._run_folder / QUALITY
            folder.mkdir(exist_ok=True)
            ours, theirs = self._predict(artifact, "test", engine), self._reference_of("test")
            np.savez(folder / "baseline.npz", **theirs.arrays())  # type: ignore[arg-type]
            np.savez(folder / "final.npz", **ours.arrays())  # type: ignore[arg-type]

    def latencies(
        self, model: Any, folder: Path, batch_sizes: Sequence[int], threads: Sequence[int], engine: str = ""
    ) -> list[Latency | NotMeasured]:
        """`model` on a grid, in `engine` or the one that will run it, against the baseline at each point."""
        with self._clock():
            found: list[Latency | NotMeasured] = []
            artifact = Artifact.save(model, folder)  # a stage may have changed it since it was given it
            for count in threads:
                contender, preview = self._contender(artifact, count, engine)
                for size, timed in zip(batch_sizes, self._time(contender, batch_sizes, folder.name), strict=True):
                    if isinstance(timed.latency, NotMeasured):
                        found.append(NotMeasured(f"batch {size}, {count} thread(s): {timed.latency.not_measured}"))
                    else:
                        found.append(replace(timed.latency, preview=preview))
            return found

    def engines(self, artifact: Artifact, names: Sequence[str]) -> dict[str, Measurement]:
        """A file in each engine of `names`: time at the target's batch sizes, quality, memory."""
        with self._clock():
            current, folder, sizes = artifact.form, artifact.folder, sorted({1, *self.target.batch_sizes})
            subjects = {name: self._as_it_is(folder, current.NAME, self.target.threads, name) for name in names}
            timed = self._time_together(subjects, sizes, folder.name)
            found = {}
            for name in names:
                first, *more = timed[name]
                try:
                    judged: Quality | NotMeasured = self._quality(self._predict(artifact, "test", name))
                except StageError as error:
                    judged = NotMeasured(str(error))
                found[name] = Measurement(
                    size_bytes=current.size_bytes(folder),
                    compressed_bytes=compressed_bytes(current, folder),
                    quality=judged,
                    latency=first.latencies(),
                    peak_memory_bytes=first.peak_memory_bytes,
                    threads=self.target.threads,
                ).with_grid([entry.latency for entry in more if isinstance(entry.latency, Latency)])
            return found

    def callers(self, model: Any, folder: Path, counts: Sequence[int], engine: str = "") -> list[Callers]:
        """`model` at batch 1 under several threads that call it at once."""
        with self._clock():
            contender, _ = self._contender(Artifact.save(model, folder), self.target.threads, engine)
            return self._bench.callers(contender, self._inputs(1), 1, counts)

    def sustained(self, model: Any, folder: Path, seconds: float, engine: str = "") -> Sustained:
        """`model` at batch 1, called for `seconds` without a pause."""
        with self._clock():
            contender, _ = self._contender(Artifact.save(model, folder), self.target.threads, engine)
            return self._bench.sustained(contender, self._inputs(1), seconds)

    def explained(self, measurement: Measurement, artifact: Artifact) -> Measurement:
        """`measurement` of a model with the slowest operators and what keeps it from being faster.

        The same with measure.explain=false, where the target's runtime shows no profile of its own, and where nothing
        can be run on this machine.
        """
        with self._clock():
            return self._explained(measurement, artifact)

    def _explained(self, measurement: Measurement, artifact: Artifact) -> Measurement:
        timed = measurement.headline()
        if timed is None or timed.runtime != "onnxruntime" or not self.settings.explain:
            return measurement
        contender, _ = self._contender(artifact, self.target.threads)
        try:
            seen, baseline = self._inspected(contender.folder), self._baseline_inspected()
        except MeasureError as error:
            say(f"  what {artifact.folder.name} is slow at could not be found out: {error}")
            return measurement
        findings = [] if timed.verdict_same_runtime == "faster" else explain.explain(seen, baseline)
        return replace(measurement, findings=findings, operators=explain.operators(seen))

    def final(self, measurement: Measurement, artifact: Artifact, engine: str) -> Measurement:
        """`measurement` of the run's result, deployed for `engine`, explained, with energy and roofline.

        A result that the target's runtime does not run is measured in the engine that will: eager PyTorch, for one
        that was not exported, whatever the figures of its previews are.
        """
        with self._clock():
            what = {"hash": artifact.hash, "form": artifact.form.NAME, "engine": engine, "of": measurement.content()}
            return self._figures("final", what, lambda: self._measured_at_last(measurement, artifact, engine))

    def _measured_at_last(self, measurement: Measurement, artifact: Artifact, engine: str) -> Measurement:
        current, folder = artifact.form, artifact.folder
        if self._is_previewed(current):
            contender = self._as_it_is(folder, current.NAME, self.target.threads)
            (timed,) = self._time(contender, [1], "final")
            measurement = replace(
                measurement,
                size_bytes=current.size_bytes(folder),
                compressed_bytes=compressed_bytes(current, folder),
                latency=timed.latencies(),
                peak_memory_bytes=timed.peak_memory_bytes,
            )
        measurement = self._explained(measurement, artifact)
        if measurement.headline() is None:
            return measurement
        contender = self._as_it_is(folder, current.NAME, self.target.threads, engine)
        if self.settings.profile and isinstance(lost := _or_reason(lambda: self._profile(contender)), NotMeasured):
            say(f"  no profile: {lost.not_measured}")
        return replace(
            measurement,
            energy_joules=_or_reason(lambda: self._energy(contender)),
            roofline=_or_reason(lambda: self._roofline(contender)),
        )

    def _figures(self, what: str, parts: dict[str, Any], compute: Callable[[], Measurement]) -> Measurement:
        """Those of an earlier run on such a machine, or what `compute` measures."""
        return compute() if self._reuse is None else self._reuse.figures(what, parts, compute)

    def _roofline(self, contender: Contender) -> Roofline | NotMeasured:
        if not self.settings.explain:
            return NotMeasured("measure.explain=false")
        if contender.runtime != "onnxruntime":
            return NotMeasured(f"optpipe does not read the graph that {contender.runtime} executes")
        return roofline.roofline(self._inspected(contender.folder), roofline.peaks(contender.threads))

    def _energy(self, contender: Contender) -> float | NotMeasured:
        """Joules of a call at batch 1."""
        if isinstance(counters := energy.domains(), NotMeasured):
            return counters  # known without calling anything for a second
        return self._bench.energy(contender, self._inputs(1), ENERGY_SECONDS)

    def _profile(self, contender: Contender) -> None:
        """Leave traces of the result, the exported baseline and the eager baseline in the run's folder."""
        folder, threads = self._run_folder / PROFILE, self.target.threads
        folder.mkdir(exist_ok=True)
        files = {"final_onnxruntime.json": contender.folder} if contender.runtime == "onnxruntime" else {}
        exported = self._exported("onnxruntime") if files else None
        if isinstance(exported, Contender):
            files["baseline_onnxruntime.json"] = exported.folder
        for name, model in files.items():
            inspect(model / "model.onnx", self._inputs(1), threads, profile=folder / name)
        if self._baseline.form != "torch":
            return
        request = {"folder": self._folder, "inputs": self._inputs(1), "path": folder / "baseline_torch.json"}
        with machine_lock().timing():
            child.ask(
                "optpipe.measure.profiler",
                {**{name: str(path.resolve()) for name, path in request.items()}, "threads": threads},
                what="the process that profiles the baseline in torch",
                threads=threads,
                timeout_seconds=self.settings.timeout_seconds,
            )

    def _baseline_inspected(self) -> Inspection | None:
        """The exported baseline as the runtime executes it; None if it could not be exported."""
        exported = self._exported("onnxruntime")
        return self._inspected(exported.folder) if isinstance(exported, Contender) else None

    def _inspected(self, folder: Path) -> Inspection:
        """The file in `folder` as the runtime executes it, looked at once for the same bytes."""
        what = _file_hash(Contender(folder, "onnxruntime", self.target.threads))
        if what not in self._seen:
            self._seen[what] = inspect(folder / "model.onnx", self._inputs(1), self.target.threads)
        return self._seen[what]

    def _contender(self, artifact: Artifact, threads: int, engine: str = "") -> tuple[Contender, bool]:
        """The saved model, or a preview of it, as the target or `engine` runs it, and whether it is a preview."""
        folder = artifact.folder
        if not self._is_previewed(artifact.form):
            return self._as_it_is(folder, artifact.form.NAME, threads, engine), False
        preview = folder / "preview" / artifact.hash[:16]
        if not preview.exists():
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                with machine_lock().working():
                    model = artifact.model
                    program = lower.trace(model, self.task) if isinstance(model, nn.Module) else model
                    runtime(self.target.runtime).lower(program, Path(partial), self.task)
                preview.parent.mkdir(exist_ok=True)
                shutil.copytree(partial, preview)
        return self._as_it_is(preview, RUNTIMES[self.target.runtime][0], threads), True

    def _is_previewed(self, current: Form) -> bool:
        """Whether a model is measured as a file that the target's runtime takes, exported for that purpose."""
        return current.NAME in ("torch", "program") and current.NAME not in RUNTIMES[self.target.runtime]

    def _as_it_is(self, folder: Path, form_name: str, threads: int, engine: str = "") -> Contender:
        """What is saved in `folder`, in `engine` or the one that will run it: the target's if that can."""
        chosen = engine or engine_of(form_name, self.target.runtime)
        options = self.target.options if chosen == self.target.runtime else {}
        return Contender(folder, chosen, threads, form_name, self.target.device, options)

    def _exported(self, engine: str) -> Contender | NotMeasured:
        """The unoptimised baseline in `engine`; lowered when an engine that takes its form is first asked for."""
        if self._baseline.form in RUNTIMES[engine]:
            return self._as_it_is(self._folder, self._baseline.form, self.target.threads, engine)
        wanted = RUNTIMES[engine][0]
        if wanted not in self._unoptimised:
            folder = self._folder / "exported" / wanted
            try:
                with tempfile.TemporaryDirectory(dir=self._folder) as partial:
                    self._lower_baseline(engine, Path(partial))
                    shutil.copytree(partial, folder)
                self._unoptimised[wanted] = folder
            except StageError as error:
                self._unoptimised[wanted] = NotMeasured(f"the unoptimised baseline cannot be exported: {error}")
        found = self._unoptimised[wanted]
        if isinstance(found, NotMeasured):
            return found
        return self._as_it_is(found, wanted, self.target.threads, engine)

    def _lower_baseline(self, engine: str, folder: Path) -> None:
        """Raises StageError if the baseline cannot become what `engine` takes."""
        if self._baseline.form not in ("torch", "program"):
            raise StageError(f"{SPOKEN[self._baseline.form]} cannot be turned into {SPOKEN[RUNTIMES[engine][0]]}")
        with machine_lock().working():
            model = form(self._baseline.form).load(self._folder)
            program = lower.trace(model, self.task) if isinstance(model, nn.Module) else model
            unoptimised = {"rewrite": False} if RUNTIMES[engine][0] == "onnx" else {}
            runtime(engine).lower(program, folder, self.task, **unoptimised)

    def _references(self, engine: str, threads: int) -> list[Contender]:
        """The baseline as it came in and, where it could be exported, unoptimised in `engine`."""
        original = replace(self._baseline, threads=threads)
        exported = self._exported(engine)
        if original.runtime == engine or isinstance(exported, NotMeasured):
            return [original]
        return [original, replace(exported, threads=threads)]

    def _baseline_against_itself(self) -> list[Timed]:
        """Each reference beside another process of the same: the noise floor of the run."""
        if not self.target.is_host:
            return [Timed.nothing(self.target.elsewhere())]
        references = self._references(self.target.runtime, self.target.threads)
        team = [*references, *references]
        try:
            (comparison,) = self._bench.compare(team, [self._inputs(1)], "timing the baseline")
        except MeasureError as error:
            return [Timed.nothing(str(error))]
        names = [f"{name}{twin}" for twin in ("", "_twin") for name in NAMES[: len(references)]]
        comparison.save(self._run_folder / SAMPLES / "00_baseline_b1.npz", names)
        twins = list(range(len(references), len(team)))
        return [
            self._summary(comparison, i, twins, 1, "00_baseline_b1", self.target.runtime)
            for i in range(len(references))
        ]

    def _time(self, subject: Contender, batch_sizes: Sequence[int], name: str) -> list[Timed]:
        """Time one contender on some batches, unless one with the same bytes was timed in this run."""
        if not self.target.is_host:
            return [Timed.nothing(self.target.elsewhere())] * len(batch_sizes)
        what = (_file_hash(subject), subject.runtime, subject.threads)
        missing = [size for size in batch_sizes if (*what, size) not in self._timed]
        found: dict[int, Timed] = {}
        if missing:
            found.update(zip(missing, self._compare(subject, missing, name), strict=True))
            good = {size: timed for size, timed in found.items() if isinstance(timed.latency, Latency)}
            self._timed.update({(*what, size): timed for size, timed in good.items()})
        return [found[size] if size in found else self._timed[(*what, size)] for size in batch_sizes]

    def _time_together(
        self, subjects: dict[str, Contender], batch_sizes: Sequence[int], name: str
    ) -> dict[str, list[Timed]]:
        """Time several contenders, by name, in one comparison, so that their ratios to the baseline compare.

        Those of different comparisons differ by more than their intervals say, since the machine changes between them.
        Where one of them does not run, each is timed alone.
        """
        alone = {own: partial(self._time, subject, batch_sizes, f"{name}_{own}") for own, subject in subjects.items()}
        if not self.target.is_host or len(subjects) < 2:
            return {own: time() for own, time in alone.items()}
        team, places = list(subjects.values()), {}
        for number, subject in enumerate(subjects.values()):
            original, *exported = self._references(subject.runtime, subject.threads)
            team += [one for one in (original, *exported) if one not in team]
            places[number] = [team.index(one) for one in (original, *exported)]
        try:
            inputs = [self._inputs(size) for size in batch_sizes]
            comparisons = self._bench.compare(team, inputs, f"timing {name} in {', '.join(subjects)}")
        except MeasureError:
            return {own: time() for own, time in alone.items()}
        found: dict[str, list[Timed]] = {own: [] for own in subjects}
        for size, comparison in zip(batch_sizes, comparisons, strict=True):
            for number, (own, subject) in enumerate(subjects.items()):
                file, of = f"{name}_{own}_b{size}_t{subject.threads}", [number, *places[number]]
                names = ["subject", *NAMES[: len(places[number])]]
                comparison.save(self._run_folder / SAMPLES / f"{file}.npz", names, of)
                timed = self._summary(comparison, number, places[number], size, file, subject.runtime)
                found[own].append(timed)
                if isinstance(timed.latency, Latency):
                    self._timed[_file_hash(subject), subject.runtime, subject.threads, size] = timed
        return found

    def _compare(self, subject: Contender, batch_sizes: Sequence[int], name: str) -> list[Timed]:
        team = [subject, *self._references(subject.runtime, subject.threads)]
        try:
            comparisons = self._bench.compare(team, [self._inputs(size) for size in batch_sizes], f"timing {name}")
        except MeasureError as error:
            if len(batch_sizes) == 1:
                return [Timed.nothing(str(error))]
            return [timed for size in batch_sizes for timed in self._compare(subject, [size], name)]
        found = []
        for size, comparison in zip(batch_sizes, comparisons, strict=True):
            file = f"{name}_b{size}_t{subject.threads}"
            comparison.save(self._run_folder / SAMPLES / f"{file}.npz", ["subject", *NAMES[: len(team) - 1]])
            found.append(self._summary(comparison, 0, list(range(1, len(team))), size, file, subject.runtime))
        return found

    def _summary(
        self, comparison: Comparison, subject: int, references: list[int], batch_size: int, file: str, engine: str
    ) -> Timed:
        """`references`: the index of the eager baseline and, unless it has none, that of the one in `engine`."""
        if comparison.problem:
            return Timed(NotMeasured(comparison.problem), comparison.peak_memory_bytes[subject])
        times = comparison.milliseconds(subject)
        p50, p95, p99 = np.percentile(times, [50, 95, 99])
        speedup, *others = (comparison.ratio(subject, reference) for reference in references)
        margin, contender = self.settings.margin, comparison.team[subject]
        own = speedup if self._baseline.runtime == engine else others[0] if others else self._exported(engine)
        same = own if isinstance(own, Ratio) else NotMeasured(getattr(own, "not_measured", "it was not exported"))
        latency = Latency(
            runtime=contender.runtime,
            batch_size=batch_size,
            threads=contender.threads,
            p50_ms=float(p50),
            p95_ms=float(p95),
            p99_ms=float(p99),
            std_ms=float(times.std(ddof=1)),
            throughput=batch_size / float(times.mean()) * 1000,
            speedup=speedup.value,
            speedup_ci95=speedup.ci95,
            speedup_same_runtime=same if isinstance(same, NotMeasured) else same.value,
            speedup_same_runtime_ci95=same if isinstance(same, NotMeasured) else same.ci95,
            verdict=speedup.verdict(margin),
            verdict_same_runtime=same if isinstance(same, NotMeasured) else same.verdict(margin),
            calls=len(times),
            replicas=len(comparison.blocks),
            load_ms=float(np.median([replica[subject] for replica in comparison.load_ms])),
            first_call_ms=float(np.median([replica[subject] for replica in comparison.first_call_ms])),
            other_load_cores=comparison.other_load_cores,
            samples=f"{SAMPLES}/{file}.npz",
            quantiles_ms=[float(value) for value in np.percentile(times, np.arange(0, 101, 5))],
            replica_p50_ms=[float(value) for value in np.median(comparison.medians(subject), axis=1)],
            replica_speedups=speedup.each,
            replica_speedups_same_runtime=[] if isinstance(same, NotMeasured) else same.each,
        )
        return Timed(latency, comparison.peak_memory_bytes[subject])

    def _quality(self, predictions: Predictions) -> Quality:
        reference = self._reference_of("test")
        with machine_lock().working():
            return quality.summary(predictions, reference, self.task.class_names)

    @contextmanager
    def evaluating(self, model: Any, engine: str = "") -> Iterator[Callable[..., Any]]:
        """`model` as a callable on torch tensors, in `engine` or the one that will run it.

        An engine whose crash would end the run has a process of its own. Raises StageError if it cannot run the model.
        """
        current = form_of(model)
        assert current is not None
        as_run = self.target.runtime == "torch" and (self.target.options or self.target.device != "cpu")
        if current.NAME in RUNTIMES["torch"] and not as_run:
            yield current.as_callable(model)
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                threads = all_threads(engine or engine_of(current.NAME, self.target.runtime))
                contender = self._as_it_is(Path(folder), current.NAME, threads, engine)
                if contender.runtime in IN_PROCESS:
                    # Of another target the arithmetic must not be this machine's: without int8 dot products, sums
                    # of pairs saturate that do not there. Where nothing is fused, products are computed in float.
                    foreign = contender.runtime == "onnxruntime" and not self.target.is_host
                    options = {**contender.options, **(UNFUSED if foreign else {})}
                    settings = contender.threads, contender.device, options
                    yield as_model(make_runner(contender.runtime, model, *settings))
                    return
                current.save(model, contender.folder)
                with self._bench.evaluator(contender) as run:
                    yield run
        except MeasureError as error:
            raise StageError(f"{contender.runtime} cannot run this model: {error}") from error

    def _predict(self, artifact: Artifact, split: Split, engine: str = "") -> Predictions:
        """A model on `split`, once for each content: steps hand one model on, and limits and figures ask again."""
        key = (artifact.hash, engine or engine_of(artifact.form.NAME, self.target.runtime), split)

        def judge() -> Predictions:
            with machine_lock().working(), self.evaluating(artifact.model, engine) as run:
                return self.task.predict(run, split)

        if key not in self._judged:
            self._judged[key] = judge() if self._reuse is None else self._reuse.predictions(*key, judge)
            for old in list(self._judged)[:-MOST_JUDGED]:
                del self._judged[old]
        return self._judged[key]

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


def _or_reason(figure: Callable[[], T]) -> T | NotMeasured:
    """What `figure` gives, or why it cannot be measured."""
    try:
        return figure()
    except MeasureError as error:
        return NotMeasured(str(error))


def _named(inputs: Inputs) -> dict[str, Any]:
    """Arrays by name; by number where they go in by position."""
    if isinstance(inputs, dict):
        return {name: tensor.numpy() for name, tensor in inputs.items()}
    return {str(i): tensor.numpy() for i, tensor in enumerate(inputs if isinstance(inputs, tuple) else (inputs,))}


def _file_hash(contender: Contender) -> str:
    """Of the bytes that the contender runs."""
    name = contender.form or RUNTIMES[contender.runtime][0]
    code = [contender.folder / "module.pt"] if name == "torch" else []  # what is shipped of a module is its weights
    digest = hashlib.sha256()
    for path in [*form(name).files(contender.folder), *code]:
        digest.update(path.read_bytes())
    return digest.hexdigest()

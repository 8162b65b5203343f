"""Reuse: what a run takes from the store in place of computing it, and what it leaves there for others.

A step's result depends on the model before it, the baseline, the stage with its settings and code, the data, the
target, the seed, and the versions of what computes; where the stage had something timed, on this machine too. What was
measured of a model depends on its content and on this machine. What cannot be identified is computed every time.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from optpipe import fingerprint
from optpipe.artifact import Artifact
from optpipe.context import Benchmarks
from optpipe.measure.measurer import SAMPLES
from optpipe.plan import Plan, Step, steps_of
from optpipe.predictions import Predictions
from optpipe.progress import say
from optpipe.rehearsal import Forecast, Forecasts
from optpipe.report import Attempt, Latency, Measurement, NotMeasured, StageResult, Table
from optpipe.report.schema import typed
from optpipe.store import KEY_FILE, Key, NoStore, Results
from optpipe.store.code import UnknownCode, code_of, code_of_modules, code_of_optpipe, value_of, versions_of
from optpipe.store.planned import planned_key
from optpipe.task import SPLITS, Split, Task, size_of

NUMBER = re.compile(r"-?[\d.]+(e-?\d+)?")  # as repr writes one


@dataclass(frozen=True)
class Place:
    """Where in the pipeline a step runs: what it is given."""

    form: str
    hash: str  # of the model before it
    engine: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a stage gave."""

    artifact: Artifact
    benchmarks: Benchmarks


class Reuse:
    """The store, as one run of `plan` on `task` uses it; not before `begin` has told it the model that came in."""

    def __init__(self, store: Results, plan: Plan, task: Task, run_folder: Path) -> None:
        self.store, self.plan, self.task, self.run_folder = store, plan, task, run_folder
        self._common: dict[str, Any] | None = None  # parts of every key; None where nothing can be used again
        self._machine: dict[str, Any] = {}
        self._said: set[str] = set()

    def begin(self, baseline: str, model: Any) -> None:
        """The model that came in, by its content and its code. From now on results can be used again."""
        if isinstance(self.store, NoStore):
            return
        try:
            code = code_of_modules(model) if isinstance(model, nn.Module) else ""
            data = data_of(self.task, self.plan)
            versions = fingerprint.package_versions() | {"optpipe": code_of_optpipe()}
            self._common = {"baseline": baseline, "model code": code, "data": data, "versions": versions}
            self._machine = fingerprint.machine()
        except UnknownCode as error:
            self._say(f"{error}; nothing of this run is kept or used again")

    def step(self, step: Step, place: Place) -> Key | None:
        """Of a stage's result; None if that cannot be identified."""
        if self._common is None:
            return None
        target = self.plan.target
        try:
            settings = {
                item.name: value_of(getattr(step.stage, item.name), f"{step.key}.{item.name}")
                for item in fields(step.stage)  # type: ignore[arg-type]
            }
            code = code_of(type(step.stage))
        except UnknownCode as error:
            self._say(f"step '{step.key}' is computed every time: {error}")
            return None
        return Key(
            "step",
            self._common
            | {
                "stage": step.info.name, "settings": settings, "stage code": code, "model": asdict(place),
                "target": _spoken(asdict(target)), "int8 instructions": target.int8_instructions().value,
                "is host": target.is_host, "seed": self.plan.seed_of(step.key), "device": self.plan.device,
                "needs": versions_of(step.info.requires), **({"machine": self._machine} if step.info.compiles else {}),
            },
        )  # fmt: skip

    def take(self, key: Key | None, folder: Path, result: StageResult) -> Outcome | None:
        """The result of `key` in `folder` and in `result`; None if it must be computed."""
        if key is None:
            return None
        content = self._found(key, folder)
        if content is None:
            return None
        self._take_samples(folder / SAMPLES, self.run_folder / SAMPLES / key.digest[:12])
        benchmarks = typed(Benchmarks, content["benchmarks"])
        benchmarks.grid = [self._moved(entry, key) for entry in benchmarks.grid]
        if benchmarks.in_engine:
            benchmarks.in_engine = replace(self._with_samples(benchmarks.in_engine, key), cached=True)
        result.cached, result.computed_seconds = True, content["seconds"]
        result.facts, result.notes = content["facts"], content["notes"]
        result.tables = typed(list[Table], content["tables"])
        result.attempts += typed(list[Attempt], content["attempts"])
        result.peak_memory_bytes = typed(int | NotMeasured, content["peak_memory_bytes"])
        self._write_key(key, folder, result)
        self._keep_place(key, result)
        return Outcome(Artifact.kept(content["form"], folder, content["hash"]), benchmarks)

    def _found(self, key: Key, folder: Path | None = None) -> dict[str, Any] | None:
        """What the store has of a step's result; what was timed is not taken where it is to be timed again."""
        timed = None if self.plan.measure.fresh else self.store.get(self._timed(key), folder)
        return timed or self.store.get(key, folder)

    def _keep_place(self, key: Key, result: StageResult) -> None:
        """Remember where a plan leads, for dry_run."""
        if (planned := planned_key(self.plan, result.key)) is not None:
            self.store.put(planned, {"kind": key.kind, "digest": key.digest})

    def keep(self, key: Key | None, folder: Path, result: StageResult, outcome: Outcome, attempts: int) -> None:
        """Keep what a stage gave. attempts: of the result's, those that are not the stage's."""
        if key is None:
            return
        artifact, benchmarks = outcome.artifact, outcome.benchmarks
        timed = [*benchmarks.grid, *_entries(benchmarks.in_engine)]
        content = {
            "form": artifact.form.NAME, "hash": artifact.hash, "benchmarks": asdict(benchmarks),
            "seconds": result.seconds, "facts": result.facts, "notes": result.notes,
            "tables": list(map(asdict, result.tables)), "attempts": list(map(asdict, result.attempts[attempts:])),
            "peak_memory_bytes": _plain(result),
        }  # fmt: skip
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        files |= self._samples(timed, f"{SAMPLES}/")
        self.store.put(self._timed(key) if benchmarks else key, content, files, replace=self.plan.measure.fresh)
        self.store.done(key)
        self._write_key(key, folder, result)
        self._keep_place(key, result)

    def figures(self, what: str, parts: dict[str, Any], compute: Callable[[], Measurement]) -> Measurement:
        """What was measured before on such a machine, marked as `cached`, or what `compute` gives.

        Nothing is kept of what could not be timed: the reason may have gone.
        """
        key = self._key("figures", {"stage": what, **parts})
        if key is None:
            return compute()
        with self.store.alone(key):
            content = None if self.plan.measure.fresh else self._figures(key)
            if content is not None:
                return replace(self._with_samples(typed(Measurement, content), key), cached=True)
            found = compute()
            if found.headline() is not None or not self.plan.target.is_host:
                files = self._samples(_entries(found), "")
                self.store.put(key, asdict(found), files, replace=self.plan.measure.fresh)
            return found

    def predictions(self, hash: str, engine: str, split: Split, compute: Callable[[], Predictions]) -> Predictions:
        """What a model said on a split before, or what `compute` gives."""
        where = {"hash": hash, "engine": engine, "split": split, "target": _spoken(asdict(self.plan.target))}
        key = self._key("predictions", where)
        if key is None:
            return compute()
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "predictions.pt"
            if (content := self.store.get(key, Path(name))) is not None:
                return Predictions(metric=self.task.metric, n=content["n"], **_read(file))
            found = compute()
            torch.save(_written(found), file)
            self.store.put(key, {"n": found.n}, {file.name: file})
            return found

    def rehearsal(self, done: int) -> Key | None:
        """Of the chain's rehearsal behind its first `done` entries."""
        steps = steps_of(self.plan.entries)
        keys = [self.step(step, Place("", "")) for step in steps]
        if self._common is None or any(key is None for key in keys):
            return None
        order = [str(entry.key) for entry in self.plan.entries]
        policy = self.plan.budget.policy.value
        return self._key(
            "rehearsal", {"steps": [key.digest for key in keys if key], "order": order, "policy": policy, "done": done}
        )

    def rehearsal_of_kind(self, done: int) -> Key | None:
        """Of the rehearsal of any chain of these stages behind `done` of them, whatever numbers they are set to."""
        keys = [self.step(step, Place("", "")) for step in steps_of(self.plan.entries)]
        if self._common is None or any(key is None for key in keys):
            return None
        steps = [Key(key.kind, _without_numbers(key.parts)).digest for key in keys if key]
        order = [str(entry.key) for entry in self.plan.entries]
        return self._key("rehearsal", {"steps": steps, "order": order, "done": done})

    def is_rehearsed(self, key: Key | None) -> bool:
        return key is not None and self.store.get(key) is not None

    def reached(self, place: Place) -> tuple[int, Key | None]:
        """How many of the first entries lead from result to result in the store, and the last one's key.

        What follows a choice is not looked for: before the run nobody knows what it takes.
        """
        last: Key | None = None
        for number, entry in enumerate(self.plan.entries):
            key = self.step(entry, place) if isinstance(entry, Step) else None
            content = self._found(key) if key else None
            if content is None:
                return number, last
            engine = place.engine if content["form"] == place.form else ""
            place = Place(content["form"], content["hash"], content["benchmarks"]["engine"] or engine)
            last = key
        return len(self.plan.entries), last

    def model(self, key: Key, folder: Path) -> Artifact | None:
        """The model that a step gave, copied to `folder`; None if the store has it no more."""
        content = self._found(key, folder)
        return Artifact.kept(content["form"], folder, content["hash"]) if content else None

    @contextmanager
    def alone(self, key: Key | None) -> Iterator[None]:
        """While a result is computed, no other process computes the same."""
        if key is None:
            yield
            return
        with self.store.alone(key):
            yield

    def partial(self, key: Key | None) -> Path | None:
        """A folder in which a training's state outlives this process."""
        return None if key is None else self.store.partial(key)

    def forecasts(self, key: Key | None) -> Forecasts | None:
        """What an earlier rehearsal of the same predicted."""
        content = None if key is None else self.store.get(key)
        if content is None:
            return None
        return {(name, settings): typed(Forecast, told) for name, settings, told in content["forecasts"]}

    def keep_forecasts(self, key: Key | None, forecasts: Forecasts) -> None:
        if key is not None:
            told = [[*where, asdict(forecast)] for where, forecast in forecasts.items()]
            self.store.put(key, {"forecasts": told})

    def _write_key(self, key: Key, folder: Path, result: StageResult) -> None:
        """Leave in the step's folder what its result depends on, for `python -m optpipe.store why`."""
        result.store_key = key.digest
        (folder / KEY_FILE).write_text(json.dumps(key.parts, indent=1, default=str) + "\n")

    def _timed(self, key: Key) -> Key:
        """That of a result which holds times of this machine, and what was chosen by them under the budget."""
        limits = _spoken(asdict(self.plan.budget))
        return Key(key.kind, key.parts | {"machine": self._machine, "measure": self._measure(), "budget": limits})

    def _key(self, kind: str, parts: dict[str, Any]) -> Key | None:
        if self._common is None:
            return None
        machine = {"machine": self._machine, "measure": self._measure()}
        return Key(kind, self._common | {"target": _spoken(asdict(self.plan.target))} | machine | parts)

    def _measure(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self.plan.measure).items() if name not in ("fresh", "profile")}

    def _figures(self, key: Key) -> dict[str, Any] | None:
        return self.store.get(key, self.run_folder / SAMPLES / key.digest[:12])

    def _samples(self, timed: list[Latency], prefix: str) -> dict[str, Path]:
        """The files with the time of every call."""
        paths = [self.run_folder / entry.samples for entry in timed if entry.samples]
        return {f"{prefix}{path.name}": path for path in paths if path.exists()}

    def _take_samples(self, source: Path, target: Path) -> None:
        if source.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target, dirs_exist_ok=True)
            shutil.rmtree(source)

    def _moved(self, latency: Latency, key: Key) -> Latency:
        path = Path(SAMPLES, key.digest[:12], Path(latency.samples).name)
        return replace(latency, samples=str(path) if (self.run_folder / path).exists() else "")

    def _with_samples(self, measurement: Measurement, key: Key) -> Measurement:
        if isinstance(measurement.latency, NotMeasured):
            return measurement
        return replace(measurement, latency=[self._moved(entry, key) for entry in measurement.latency])

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(f"store: {text}")


def _without_numbers(parts: dict[str, Any]) -> dict[str, Any]:
    """A step's key without its seed, and without the settings that are plain numbers."""
    settings = {name: value for name, value in parts["settings"].items() if not NUMBER.fullmatch(value)}
    return {name: value for name, value in parts.items() if name != "seed"} | {"settings": settings}


def data_of(task: Task, plan: Plan) -> dict[str, Any]:
    """What identifies the data of `task` and how they are judged. Raises UnknownCode."""
    if not task.fingerprint:
        raise UnknownCode("the task has no fingerprint, so that its data cannot be identified")
    given = {name: value_of(getattr(task, name), f"the task's {name}") for name in (
        "fingerprint", "metric", "loss", "outputs", "input_names", "output_names", "preprocess", "postprocess",
        "class_names", "slices", "example_inputs",
    )}  # fmt: skip
    made = {"factory": value_of(plan.data.factory, "data.factory"), "args": _spoken(plan.data.args)}
    return {**given, **made, "batches": {split: _batches(getattr(task, split)) for split in SPLITS}}


def _batches(split: Any) -> str:
    """How a split is read, as far as it says: the fingerprint is of the data, not of how they are cut. UnknownCode."""
    kind = value_of(type(split), "the task's data")
    if isinstance(split, DataLoader):
        kind += f" {value_of(type(split.dataset), 'a data set')} {value_of(split.collate_fn, 'collate_fn')}"
        return f"{kind} {split.batch_size}, {type(split.sampler).__name__}, drop_last {split.drop_last}"
    if isinstance(split, Sequence):
        return f"{kind} {[size_of(inputs) for inputs, _ in split]}"
    return kind


def _spoken(value: Any) -> Any:
    """In types that JSON holds."""
    if isinstance(value, dict):
        return {str(key): _spoken(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spoken(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else getattr(value, "value", str(value))


def _plain(result: StageResult) -> Any:
    peak = result.peak_memory_bytes
    return asdict(peak) if isinstance(peak, NotMeasured) else peak


def _entries(measurement: Measurement | None) -> list[Latency]:
    if measurement is None or isinstance(measurement.latency, NotMeasured):
        return []
    return measurement.latency


def _written(found: Predictions) -> dict[str, Any]:
    scores = None if found.scores is None else torch.from_numpy(found.scores)
    return {"scores": scores, "outputs": found.outputs, "targets": found.targets, "slices": found.slices}


def _read(file: Path) -> dict[str, Any]:
    held: dict[str, Any] = torch.load(file, weights_only=True)
    scores = held.pop("scores")
    return {**held, "scores": None if scores is None else scores.numpy()}

"""The result of recipe cpu_fast against the tools of other makers, in one paired run for each network.

    python benchmarks/peers.py                      # everything; about an hour on 2 cores
    python benchmarks/peers.py --only digits --quick
    python benchmarks/peers.py --table --output docs/peers.tables.md     # what was measured before, at once

Prints Markdown tables and whether what is asked of optpipe holds; ends with 1 if something does not:

- latency at most LATENCY times, and size at most SIZE times, that of the best of the others that lose at most half a
  point on the test split against the network as it came in, at batch 1 and 16; our own loss at most half a point
- likewise at most the same, SAME, where the others are given the network that our recipe pruned and distilled

"At most" is judged by the estimate; where the 95 % interval straddles the limit, that is said. All contenders of a
network take turns in one comparison, each in worker processes of its own, one thread. The fastest of them, LEADERS
for each question, are timed against ours once more without the others: the best of many estimates looks better than it
is, and a small field is measured more often. The tools are used with the
defaults that their documentation shows and in the ways that it recommends for speed (`ways`); each way competes. Ours
is also timed against a second set of processes with the same files: how far that ratio is from 1 is noise.

Runs, files and times are kept in outputs/benchmarks/peers, by network. What depends on nothing that has changed is not
made or timed again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import makers
import numpy as np
import onnxruntime as ort
import torch
from quantizers import markdown, plain
from torch import nn

from optpipe.errors import OptpipeError, named_reason
from optpipe.fingerprint import environment
from optpipe.forms import form
from optpipe.machine import cpu, machine_lock, usable_cores
from optpipe.manifest import read
from optpipe.measure import quality
from optpipe.measure.latency import Bench, Comparison, Contender
from optpipe.measure.settings import Measure
from optpipe.predictions import Predictions, join
from optpipe.progress import say
from optpipe.sources import call_factory
from optpipe.task import Task, batch_of, map_tensors, tensors_in

RESULTS = Path("outputs/benchmarks/peers")
RECIPE = "cpu_fast"
LATENCY, SIZE, SAME = 0.7, 0.5, 1.0  # ours / the best of the others
MARGIN = 0.02  # of a ratio around 1 within which two times are the same
HALF_A_POINT = 0.005
LEADERS = 3  # of the others, that are timed again
BATCH_SIZES = (1, 16)
# One contender of many that is noisy must not cost the others their figures: each bar is judged by its own interval.
MEASURE = Measure(replicas=8, max_seconds=120.0, interval_width=0.03, noise_limit=1000.0)
TOO_NOISY = 1.4  # upper / lower end of an interval
PROBE = Measure(replicas=2, rounds=1, max_seconds=0.1)
TOOLS = ("nncf", "openvino", "olive-ai", "torchao")
CAME_IN, DISTILLED = "as it came in", "pruned and distilled by optpipe"
PRODUCTS = ("MatMul", "Gemm", "Gather")
OURS = "optpipe"


@dataclass(frozen=True)
class Network:
    """A network, its task, and what the recipe is told about it."""

    model: str  # dotted path of the callable that returns it
    task: str
    overrides: tuple[str, ...] = ()
    is_transformer: bool = False


# The recipe's pipeline without pruning, for networks whose place a smaller one takes.
ENGINES = (
    "[quantize,trace,export]",
    "[quantize_openvino,trace_openvino,export_openvino]",
    "[trace_float,export_float]",
    "[trace_compiled,export_compiled]",
)
STUDENT = f"pipeline=[simplify,distill,{{best_of:[{','.join(ENGINES)}]}},benchmark]"
# The stack of each network, chosen on validation data (docs/peers.md).
NETWORKS = {
    "digits": Network("optpipe.zoo.digits.trained", "optpipe.zoo.digits.task"),
    "docstrings": Network(
        "optpipe.zoo.docstrings.trained",
        "optpipe.zoo.docstrings.task",
        (
            "model=docstrings",
            "data=docstrings",
            STUDENT,
            "distill.student=optpipe.zoo.docstrings.TextEncoder",
            "+distill.student_args.width=64",
            "+distill.student_args.layers=2",
            "distill.epochs=24",
            "distill.learning_rate=2e-3",
        ),
        is_transformer=True,
    ),
    "residual_mlp": Network(
        "optpipe.zoo.propositions.trained_mlp",
        "optpipe.zoo.propositions.task",
        (
            "model=residual_mlp",
            "data=propositions",
            STUDENT,
            "distill=logits_student",
            "distill.student_args.width=64",
            "distill.epochs=8",
            "quantize=weight_only_load",
        ),
    ),
}


@dataclass(frozen=True)
class Source:
    """The network that the others are given, and its ONNX files."""

    model: nn.Module
    task: Task
    folder: Path

    @cached_property
    def exported(self) -> Path:
        """As torch writes it."""
        return self._written("exported.onnx", rewrite=False)

    @cached_property
    def rewritten(self) -> Path:
        """As optpipe writes it, with its attention operator."""
        return self._written("rewritten.onnx", rewrite=True)

    def _written(self, name: str, *, rewrite: bool) -> Path:
        path = self.folder / name.removesuffix(".onnx") / name
        path.parent.mkdir()
        makers.export(copy.deepcopy(self.model), self.task, path, rewrite=rewrite)
        return path


@dataclass(frozen=True)
class Way:
    """One tool, used in one way."""

    tool: str
    name: str
    make: Callable[[Source, Path, int], None]  # (what it is given, folder, batch size where it is fixed) -> files
    runtime: str = "onnxruntime"
    form: str = "onnx"
    options: dict[str, Any] = field(default_factory=dict)  # of the runtime
    is_fixed: bool = False  # to one batch size, so that it is made for each
    package: str = "onnxruntime"


@dataclass(frozen=True)
class Made:
    """A contender: where its files are, what runs them."""

    name: str
    folder: Path
    runtime: str
    form: str
    options: dict[str, Any] = field(default_factory=dict)
    is_fixed: bool = False

    def at(self, batch_size: int) -> Contender:
        return Contender(self._at(batch_size), self.runtime, 1, self.form, options=self.options)

    def hash(self, batch_size: int) -> str:
        digest = hashlib.sha256(repr((self.runtime, self.options)).encode())
        for path in form(self.form).files(self._at(batch_size)):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def size_bytes(self) -> int:
        return form(self.form).size_bytes(self._at(1))

    def predictions(self, task: Task, bench: Bench) -> Predictions:
        size = max(BATCH_SIZES)
        with bench.evaluator(self.at(size)) as model:
            return task.predict(in_parts(model, size) if self.is_fixed else model, "test")

    def _at(self, batch_size: int) -> Path:
        return self.folder / f"batch_{batch_size}" if self.is_fixed else self.folder


@dataclass
class Entry:
    """What is known of a contender."""

    name: str
    given: str  # which network
    tool: str
    way: str
    problem: str = ""  # why there are no figures
    hashes: list[str] = field(default_factory=list)  # of the files at each batch size
    size_bytes: int = 0
    value: float = 0.0
    delta: float = 0.0  # quality, against the network as it came in
    delta_ci95: tuple[float, float] = (0.0, 0.0)

    @property
    def keeps_quality(self) -> bool:
        return not self.problem and self.delta >= -HALF_A_POINT


@dataclass
class Time:
    """A contender at one batch size."""

    p50_ms: float
    ratio: float  # time of ours / this time
    ci95: tuple[float, float]


@dataclass
class Timing:
    """All contenders of a network at one batch size."""

    hashes: dict[str, str]
    times: dict[str, Time]
    noise: float  # time of ours / time of ours in other processes
    problem: str = ""


@dataclass
class Result:
    """A network's, as it is kept on the disk."""

    where: str
    runtime: str  # of ours
    test_samples: int
    baseline: float  # quality as it came in
    entries: list[Entry] = field(default_factory=list)
    timings: dict[str, Timing] = field(default_factory=dict)  # by batch size
    leaders: dict[str, Timing] = field(default_factory=dict)  # likewise, without the others

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Result:
        kept = json.loads(path.read_text())
        kept["entries"] = [Entry(**entry) for entry in kept["entries"]]
        for name in ("timings", "leaders"):
            for timing in kept.get(name, {}).values():
                timing["times"] = {name: Time(**time) for name, time in timing["times"].items()}
            kept[name] = {size: Timing(**timing) for size, timing in kept.get(name, {}).items()}
        return cls(**kept)

    @property
    def ours(self) -> Entry:
        return self.entries[0]

    def others(self, given: str) -> list[Entry]:
        return [entry for entry in self.entries[1:] if entry.given == given]


def ways(network: Network) -> list[Way]:
    """Every tool with the defaults of its documentation, and as it recommends for speed on a processor.

    Where several recommendations exclude one another, all of them.
    """
    text = network.is_transformer
    bf16 = [{"precision": "bf16"}] if {"avx512_bf16", "amx_bf16"} & cpu()[1] else []
    default = bf16[0] if bf16 else {}  # OpenVINO's own choice on such a processor
    onnxruntime = [
        Way("ONNX Runtime static", "defaults", _file(makers.onnxruntime_static_defaults)),
        Way("ONNX Runtime static", "U8S8, per channel", _file(makers.onnxruntime_static)),
        Way("ONNX Runtime dynamic", "defaults", _untasked(makers.onnxruntime_dynamic_defaults)),
        Way("ONNX Runtime dynamic", "per channel", _untasked(makers.onnxruntime_dynamic)),
    ]
    if text:
        products = partial(makers.onnxruntime_static, operators=PRODUCTS)
        onnxruntime += [
            Way("ONNX Runtime static", "U8S8, per channel, products only", _file(products)),
            Way(
                "ONNX Runtime static", "U8S8, per channel, products only, attention operator",
                _file(partial(products, symbolic_shapes=False), rewritten=True),
            ),
        ]  # fmt: skip
    quantise = partial(makers.nncf_openvino, transformer=text)
    nncf = [
        Way("NNCF + OpenVINO", "defaults", _folder(makers.nncf_openvino), **_openvino(default)),
        *(
            Way(
                "NNCF + OpenVINO",
                f"{'transformer, ' if text else ''}fixed shapes, {options.get('precision', 'f32')}",
                _folder(quantise), is_fixed=True, **_openvino(options),
            )
            for options in ({}, *bf16)
        ),
    ]  # fmt: skip
    tuned = {"freezing": True, "max_autotune": True}
    inductor = {"runtime": "aotinductor", "form": "aotinductor", "package": "torch"}
    aotinductor = [
        Way("AOTInductor", "defaults", _folder(makers.aotinductor), **inductor),
        Way(
            "AOTInductor", "frozen, autotuned", _folder(partial(makers.aotinductor, **tuned)), is_fixed=True, **inductor
        ),
        Way(
            "AOTInductor", "int8, frozen, autotuned", _folder(partial(makers.aotinductor, int8=True, **tuned)),
            is_fixed=True, **inductor,
        ),
    ]  # fmt: skip
    fast = {"activation_type": "uint8", "per_channel": True}
    transformer = ("OrtTransformersOptimization", {"model_type": "bert"})
    peephole = ("OnnxPeepholeOptimizer", {})
    olive = [
        ("static, defaults", [("OnnxStaticQuantization", {})]),
        ("static, U8S8, per channel", [peephole, ("OnnxStaticQuantization", fast)]),
        ("dynamic, defaults", [("OnnxDynamicQuantization", {})]),
        (
            "dynamic, per channel",
            [transformer if text else peephole, ("OnnxDynamicQuantization", {"per_channel": True})],
        ),
    ]
    return [
        *onnxruntime,
        *nncf,
        *aotinductor,
        *(Way("Olive", name, _file(partial(makers.olive, passes=passes)), package="olive") for name, passes in olive),
    ]


def _file(make: Callable[..., None], *, rewritten: bool = False) -> Callable[[Source, Path, int], None]:
    """Of a function of an exported file, the file to write, and the task."""
    return lambda source, folder, _: make(
        source.rewritten if rewritten else source.exported, folder / makers.ONNX, source.task
    )


def _untasked(make: Callable[..., None]) -> Callable[[Source, Path, int], None]:
    return _file(lambda exported, path, _: make(exported, path))


def _folder(make: Callable[..., None]) -> Callable[[Source, Path, int], None]:
    """Of a function of a model, the folder to write to, the task, and the batch size where that is fixed."""
    return lambda source, folder, size: make(
        source.model, folder, source.task, **({"batch_size": size} if size else {})
    )


def _openvino(options: dict[str, Any]) -> dict[str, Any]:
    return {"runtime": "openvino", "form": "openvino", "options": options, "package": "nncf"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(NETWORKS), action="append", help="by default all")
    parser.add_argument("--quick", action="store_true", help="rough times, to try the command out")
    parser.add_argument("--table", action="store_true", help="run nothing; show what was measured before")
    parser.add_argument("--output", type=Path, help="a file to write the report to as well")
    asked = parser.parse_args()
    ort.set_default_logger_severity(4)
    torch.set_num_threads(usable_cores())
    measure = Measure(replicas=3, rounds=3, max_seconds=1.0, noise_limit=1.0) if asked.quick else MEASURE
    names = asked.only or list(NETWORKS)
    if not asked.table:
        for name in names:
            run(name, measure)
    kept = {name: Result.read(file) for name in names if (file := RESULTS / name / "result.json").exists()}
    text = "\n\n".join(part for name, result in kept.items() for part in (f"## {name}", *tables(result)))
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")
    missing = set(names) - set(kept)
    return int("DOES NOT HOLD" in text or "NOT SHOWN" in text or bool(missing))


# One network: our run, their files, quality, times.


def run(name: str, measure: Measure) -> None:
    network, folder = NETWORKS[name], RESULTS / name
    task: Task = call_factory("data", network.task, {}, "data")
    model: nn.Module = call_factory("model", network.model, {}, "model").eval()
    recipe_run = our_run(name, network)
    manifest = read(recipe_run)
    ours = Made(OURS, recipe_run / "model", manifest["runtime"], manifest["form"], manifest["options"])
    found: dict[str, Made] = {OURS: ours}
    entries = [Entry(name=OURS, given=CAME_IN, tool=OURS, way=f"recipe {RECIPE}, in {ours.runtime}")]
    with tempfile.TemporaryDirectory() as scratch, Bench(PROBE, Path(scratch) / "workers") as bench:
        for given, source in ((CAME_IN, model), (DISTILLED, distilled(recipe_run))):
            for way in ways(network):
                entry, made = made_by(way, given, source, task, folder / plain(given))
                entries.append(entry)
                if not entry.problem:
                    found[entry.name] = made
        baseline = task.predict(model, "test")
        for entry in entries:
            judge(entry, found, task, baseline, bench, folder)
    kept = Result.read(folder / "result.json") if (folder / "result.json").exists() else None
    before = (kept.timings, kept.leaders) if kept else ()
    result = Result(where(), ours.runtime, baseline.n, baseline.value, entries, *before)
    result.write(folder / "result.json")
    running = {entry.name: found[entry.name] for entry in entries if not entry.problem}
    for size in BATCH_SIZES:
        time_once(name, result.timings, running, task, size, measure, folder)
        result.write(folder / "result.json")
        fastest = {entry.name: running[entry.name] for entry in [result.ours, *leading(result, size)]}
        time_once(name, result.leaders, fastest, task, size, measure, folder)
        result.write(folder / "result.json")


def leading(result: Result, size: int) -> list[Entry]:
    """The fastest of those that keep quality, of each network that the others were given."""
    found = []
    for given in (CAME_IN, DISTILLED):
        times = [(e, time) for e in result.others(given) if e.keeps_quality and (time := time_at(result, size, e))]
        found += [entry for entry, _ in sorted(times, key=lambda pair: -pair[1].ratio)[:LEADERS]]
    return found


def time_once(
    name: str, timings: dict[str, Timing], team: dict[str, Made], task: Task, size: int, measure: Measure, folder: Path
) -> None:
    """Time `team` at a batch size, unless the same files were timed by the same versions before."""
    hashes = {key: made.hash(size) for key, made in team.items()}
    hashes["measured"] = _digest([asdict(measure), versions(), environment()["cpu"]])
    if (kept := timings.get(str(size))) and kept.hashes == hashes and not kept.problem:
        return
    say(f"{name}: timing {len(team)} contenders at batch size {size}")
    timings[str(size)] = timed(team, hashes, task, size, measure, folder)


def our_run(name: str, network: Network) -> Path:
    """The folder of the recipe's run on `network`; that of an earlier one, if it was of the same command."""
    folder = RESULTS / name / OURS
    words = [f"+recipe={RECIPE}", *network.overrides, "tracking=none", "store=none"]
    told = folder / "command.json"
    key = [*words, *versions(), _digest(_sources())]
    if not told.exists() or json.loads(told.read_text()) != key:
        say(f"{name}: {' '.join(words)}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "optpipe", *words, f"hydra.run.dir={folder}"], check=True)
        told.write_text(json.dumps(key))
    return folder


def _sources() -> dict[str, str]:
    """optpipe's own code and configuration."""
    root = Path(__file__).resolve().parents[1]
    files = [path for name in ("optpipe", "stages", "conf") for path in sorted((root / name).rglob("*"))]
    return {str(path.relative_to(root)): path.read_text() for path in files if path.suffix in (".py", ".yaml")}


def distilled(recipe_run: Path) -> nn.Module:
    """The network as it left the step that distils: pruned, if it was, and trained, in float32."""
    (folder,) = recipe_run.glob("*_distill")
    model: nn.Module = form("torch").load(folder)
    return model.eval()


def made_by(way: Way, given: str, model: nn.Module, task: Task, folder: Path) -> tuple[Entry, Made]:
    """The files of `way`, made now unless they were from the same weights by the same versions."""
    name = f"{way.tool}: {way.name}; {given}"
    entry = Entry(name=name, given=given, tool=way.tool, way=way.name)
    made = Made(name, folder / plain(f"{way.tool} {way.name}"), way.runtime, way.form, way.options, way.is_fixed)
    if importlib.util.find_spec(way.package) is None:
        entry.problem = f"{way.package} is not installed"
        return entry, made
    told = made.folder / "made.json"
    key = {"weights": form("torch").content_hash(model), "tools": Path(makers.__file__).read_text(), "of": versions()}
    kept = json.loads(told.read_text()) if told.exists() else {}
    if kept.get("key") != _digest(key):
        say(name)
        shutil.rmtree(made.folder, ignore_errors=True)
        made.folder.mkdir(parents=True)
        try:
            with machine_lock().working(), tempfile.TemporaryDirectory() as scratch:
                source = Source(model, task, Path(scratch))
                for size in BATCH_SIZES if way.is_fixed else (0,):
                    part = made.folder / f"batch_{size}" if size else made.folder
                    part.mkdir(exist_ok=True)
                    way.make(source, part, size)
            kept = {"key": _digest(key), "problem": ""}
        except Exception as error:  # of another maker's tool: it is a finding
            kept = {"key": _digest(key), "problem": f"cannot make it: {named_reason(error)}"}
        told.write_text(json.dumps(kept))
    entry.problem = kept["problem"]
    return entry, made


def judge(entry: Entry, found: dict[str, Made], task: Task, baseline: Predictions, bench: Bench, folder: Path) -> None:
    """Fill in size and quality, or why it does not run."""
    if entry.problem:
        return
    made = found[entry.name]
    entry.hashes = [made.hash(size) for size in BATCH_SIZES]
    try:
        for size in BATCH_SIZES:
            bench.compare([made.at(size)], [inputs(task, size, folder)])
        said = quality.summary(made.predictions(task, bench), baseline)
    except OptpipeError as error:
        entry.problem = f"does not run: {error}"
        return
    entry.size_bytes, entry.value = made.size_bytes, said.value
    entry.delta, entry.delta_ci95 = said.delta, said.delta_ci95


def timed(
    running: dict[str, Made], hashes: dict[str, str], task: Task, size: int, measure: Measure, folder: Path
) -> Timing:
    """All contenders in one comparison; ours, the first, once more at the end."""
    names = list(running)
    team = [made.at(size) for made in running.values()]
    with tempfile.TemporaryDirectory() as scratch, Bench(measure, Path(scratch) / "workers") as bench:
        comparison = bench.compare([*team, team[0]], [inputs(task, size, folder)])[0]
    times = {name: time_of(comparison, number) for number, name in enumerate(names)}
    return Timing(hashes, times, comparison.ratio(len(team), 0).value, comparison.problem)


def time_of(comparison: Comparison, number: int) -> Time:
    ratio = comparison.ratio(number, 0)
    return Time(float(np.median(comparison.milliseconds(number))), ratio.value, ratio.ci95)


def inputs(task: Task, size: int, folder: Path) -> Path:
    """The first validation samples."""
    path = folder / f"inputs_{size}.npz"
    if not path.exists():
        samples, _ = next(iter(task.validation))
        arrays = {str(i): tensor.numpy() for i, tensor in enumerate(tensors_in(batch_of(samples, size)))}
        np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def first(outputs: Any, size: int) -> Any:
    return map_tensors(lambda tensor: tensor[:size], outputs)


def in_parts(model: Callable[..., Any], size: int) -> Callable[..., Any]:
    """A model of exactly `size` samples as one of batches of one tensor; the last part is filled up by repetition."""

    def whole(batch: torch.Tensor) -> Any:
        parts = batch.split(size)
        return join([first(model(batch_of(part, size)), len(part)) for part in parts])

    return whole


# Tables and bars.


def versions() -> list[str]:
    machine = environment()
    extra = {name: version(name) for name in TOOLS if importlib.util.find_spec(name.removesuffix("-ai"))}
    return [f"{package} {number}" for package, number in {**machine["versions"], **extra}.items()]


def where() -> str:
    return f"{cpu()[0]} ({', '.join(sorted(cpu()[1]))}), 1 thread; {', '.join(versions())}."


def tables(result: Result) -> list[str]:
    ours = result.ours
    header = ["tool", "way", "KB", "Δ points [95 %]"]
    for size in BATCH_SIZES:
        header += [f"batch {size}: p50 ms", "ours / theirs [95 %]"]
    said = [
        result.where,
        f"Quality as it came in: {result.baseline:.2%} of {result.test_samples} test samples. "
        f"Ours runs in {result.runtime}.",
    ]
    for given in (CAME_IN, DISTILLED):
        entries = [ours, *result.others(given)]
        said += [f"### The others are given the network {given}", markdown(header, [row(e, result) for e in entries])]
    said += ["\n".join(f"- {bar}" for bar in bars(result))]
    timings = {**result.timings, **result.leaders}
    noise = [f"{abs(timing.noise - 1):.1%} at batch {size}" for size, timing in timings.items()]
    said += [f"Ours against itself in other processes: {', '.join(noise)} apart."] if noise else []
    said += [f"At batch {size}: {timing.problem}" for size, timing in result.timings.items() if timing.problem]
    return said


def row(entry: Entry, result: Result) -> list[str]:
    if entry.problem:
        return [entry.tool, entry.way, entry.problem.splitlines()[0], *[""] * (1 + 2 * len(BATCH_SIZES))]
    low, high = (100 * bound for bound in entry.delta_ci95)
    lost = "" if entry.keeps_quality else ", loses too much"
    cells = [
        entry.tool,
        entry.way,
        f"{entry.size_bytes / 1000:.1f}",
        f"{100 * entry.delta:+.2f} [{low:+.2f}, {high:+.2f}]{lost}",
    ]
    for size in BATCH_SIZES:
        time = time_at(result, size, entry)
        ratio = (
            f"{time.ratio:.2f} [{time.ci95[0]:.2f}, {time.ci95[1]:.2f}]" if time and entry is not result.ours else ""
        )
        cells += [f"{time.p50_ms:.3f}" if time else "not timed", ratio]
    return cells


def time_at(result: Result, size: int, entry: Entry, *, again: bool = False) -> Time | None:
    """`again`: that without the others."""
    timing = (result.leaders if again else result.timings).get(str(size))
    return timing.times.get(entry.name) if timing else None


def bars(result: Result) -> list[str]:
    """What is asked of ours, and whether it holds."""
    ours = result.ours
    low, high = (100 * bound for bound in ours.delta_ci95)
    holds = "holds" if ours.keeps_quality else "DOES NOT HOLD"
    found = [f"ours loses at most half a point: {holds}, {100 * ours.delta:+.2f} [{low:+.2f}, {high:+.2f}]"]
    for given, limit in ((CAME_IN, LATENCY), (DISTILLED, SAME)):
        for size in BATCH_SIZES:
            found += latency_bar(result, given, size, limit)
        kept = [entry for entry in result.others(given) if entry.keeps_quality]
        if kept:
            smallest = min(kept, key=lambda entry: entry.size_bytes)
            share, limit = ours.size_bytes / smallest.size_bytes, SIZE if given == CAME_IN else SAME
            holds = "holds" if share <= limit else "DOES NOT HOLD"
            found.append(
                f"size, others given the network {given}, ≤ {limit} ×: {holds}, {share:.2f} × {label(smallest)}"
            )
        else:
            found.append(f"size, others given the network {given}: NOT SHOWN, none of them keeps its quality")
    return found


def latency_bar(result: Result, given: str, size: int, limit: float) -> Iterator[str]:
    """Against the fastest of the others that keep quality; two times within MARGIN are the same."""
    others = [entry for entry in result.others(given) if entry.keeps_quality]
    timed = {e.name: (e, time) for e in others if (time := time_at(result, size, e, again=str(size) in result.leaders))}
    if not timed:
        yield f"latency at batch {size}, others given the network {given}: NOT SHOWN, none keeps its quality"
        return
    best, time = max(timed.values(), key=lambda pair: pair[1].ratio)
    if time.ci95[1] > TOO_NOISY * time.ci95[0]:
        yield (
            f"latency at batch {size}, others given the network {given}: NOT SHOWN, too noisy: {time.ratio:.2f} × "
            f"[{time.ci95[0]:.2f}, {time.ci95[1]:.2f}] {label(best)}"
        )
        return
    allowed = limit * (1 + MARGIN) if limit == SAME else limit
    low, high = time.ci95
    holds = "holds" if time.ratio <= allowed else "DOES NOT HOLD"
    undecided = ", undecided: the interval straddles it" if low <= allowed < high else ""
    yield (
        f"latency at batch {size}, others given the network {given}, ≤ {allowed:g} ×: {holds}, {time.ratio:.2f} × "
        f"[{low:.2f}, {high:.2f}] {label(best)}{undecided}"
    )


def label(entry: Entry) -> str:
    return f"{entry.tool} ({entry.way})"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())

"""optpipe's int8 files against those of other quantisers: same networks, same calibration data, same runtime.

    python benchmarks/quantizers.py                        # everything: about 10 minutes on 2 cores
    python benchmarks/quantizers.py --no-timing            # files and quality, and the times that were taken before
    python benchmarks/quantizers.py --network docstrings --output FILE

Prints a Markdown report. Ends with 1 if ours is, against any of them, worse (the whole 95 % interval of the paired
difference below 0), larger, or slower (the whole interval of the paired ratio of times above LIMIT).

The networks are the reference networks of the zoo, and the digits network without seven of ten channels, distilled.
The others are ONNX Runtime's own static quantiser, used as its documentation advises (pre-processed, QDQ, weights per
channel, unsigned activations and signed weights, as ours), and NNCF (`pip install -e ".[compare]"`). Both get an export
of the same network. That of the text encoder comes in two kinds: as torch writes it, and with the attention operator
that our exporter uses, which only ONNX Runtime's quantiser takes. All files run in ONNX Runtime, each in worker
processes of its own, in alternating blocks of calls on the same samples. Ours is also timed against a second set of
processes with the same file: how far that ratio is from 1 is noise.

Files and times are kept in outputs/benchmarks/quantizers. Files are made again each time; a pair whose files are the
same as when it was timed is not timed again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import makers
import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from optpipe.context import Context
from optpipe.fingerprint import environment
from optpipe.forms import ExportedFile, form
from optpipe.forms import torch as torch_form
from optpipe.machine import machine_lock, usable_cores
from optpipe.measure import quality
from optpipe.measure.latency import Bench, Contender
from optpipe.measure.measurer import Measurer
from optpipe.measure.settings import Measure
from optpipe.predictions import Predictions
from optpipe.progress import say
from optpipe.runtimes.onnxruntime import session_options
from optpipe.stages.distill.logits import Logits  # type: ignore[import-not-found]
from optpipe.stages.prune.channels import Channels  # type: ignore[import-not-found]
from optpipe.stages.quantize.static import Signedness, Static  # type: ignore[import-not-found]
from optpipe.target import Target
from optpipe.task import Task, batch_of
from optpipe.zoo import digits, docstrings

RESULTS = Path("outputs/benchmarks/quantizers")
LIMIT = 1.03  # time of ours / time of theirs
BATCH_SIZES = (1, 16)
TARGET = Target(threads=1)
onnx_form = form("onnx")
MEASURE = Measure(replicas=12, max_seconds=8.0, interval_width=0.02)
PRUNE = Channels(ratio=0.7, round_to=16)  # the settings of recipe edge_int8
DISTILL = Logits(epochs=10)
OURS = Static(signedness=Signedness.u8s8)  # the types that the others are asked for
PRODUCTS = ("MatMul", "Gemm", "Gather")


@dataclass(frozen=True)
class Rival:
    """A quantiser of other makers, and how it is used."""

    name: str
    tool: str = "onnxruntime"  # or "nncf"
    operators: tuple[str, ...] = ()  # to quantise; none names its default set
    rewritten: bool = True  # whether it gets our exporter's rewritten graph, or torch's
    symbolic_shapes: bool = (
        True  # whether ONNX Runtime's pre-processing infers them; it cannot with the attention operator
    )


NETWORKS = {
    "digits": (Rival("ONNX Runtime"), Rival("NNCF", tool="nncf")),
    "digits, pruned": (Rival("ONNX Runtime"), Rival("NNCF", tool="nncf")),
    "docstrings": (
        Rival("ONNX Runtime", rewritten=False),
        Rival("ONNX Runtime, products only", operators=PRODUCTS, rewritten=False),
        Rival("ONNX Runtime, attention operator", symbolic_shapes=False),
        Rival("ONNX Runtime, products only, attention operator", operators=PRODUCTS, symbolic_shapes=False),
        Rival("NNCF, transformer", tool="nncf", rewritten=False),
    ),
}


@dataclass(frozen=True)
class Network:
    """A reference network, and where its files are kept."""

    name: str
    task: Task
    model: nn.Module

    @property
    def folder(self) -> Path:
        return RESULTS / plain(self.name)

    @property
    def ours(self) -> Made:
        return Made("optpipe", self.folder / "optpipe")

    def made_by(self, rival: Rival) -> Made:
        return Made(rival.name, self.folder / plain(rival.name))


@dataclass(frozen=True)
class Made:
    """A quantised file, in a folder of its own."""

    maker: str
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / makers.ONNX

    @property
    def size_bytes(self) -> int:
        return onnx_form.size_bytes(self.folder)

    def predictions(self, task: Task) -> Predictions:
        return task.predict(onnx_form.as_callable(ExportedFile(self.path, onnx_form.NAME)), "test")

    def operators(self) -> Counter[str]:
        """Number of operators of each type in the graph that ONNX Runtime makes of the file and runs."""
        options = session_options(TARGET.threads)
        with tempfile.TemporaryDirectory() as name:
            options.optimized_model_filepath = str(Path(name) / "optimised.onnx")
            ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
            return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@dataclass(frozen=True)
class Timing:
    """Ours against theirs, and against ours once more, at one batch size."""

    files: list[str]  # hashes of both
    slowdown: float  # time of ours / time of theirs
    slowdown_ci95: tuple[float, float]
    noise: float  # time of ours / time of ours in other processes
    ours_p50_ms: float
    theirs_p50_ms: float


@dataclass
class Report:
    """Tables, what is wrong with ours, and what is not known."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="by default all")
    parser.add_argument("--no-timing", action="store_true", help="time nothing; show what was timed before")
    parser.add_argument("--output", type=Path, help="a file to write the report to as well")
    asked = parser.parse_args()
    ort.set_default_logger_severity(3)
    torch.set_num_threads(usable_cores())
    report = Report([where()])
    with tempfile.TemporaryDirectory() as scratch, Bench(MEASURE, Path(scratch) / "workers") as bench:
        for name in asked.network or NETWORKS:
            with machine_lock().working():
                network = make_network(name, bench)
                rivals = make_files(network, bench)
            if not asked.no_timing:
                for rival in rivals:
                    for batch_size in BATCH_SIZES:
                        time(network, rival, batch_size, bench)
            add(report, network, rivals)
    text = "\n\n".join([*report.lines, verdict(report)])
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")
    return int(bool(report.failures))


# Networks and files.


def make_network(name: str, bench: Bench) -> Network:
    zoo = docstrings if name == "docstrings" else digits
    network = Network(name, zoo.task(), zoo.trained())
    network.folder.mkdir(parents=True, exist_ok=True)
    return network if name != "digits, pruned" else Network(name, network.task, pruned(network, bench))


def pruned(network: Network, bench: Bench) -> nn.Module:
    """`network` without most of its channels, distilled from itself; the first call's result is kept."""
    folder = network.folder / "weights"
    if not all(path.exists() for path in torch_form.files(folder)):
        say("pruning and distilling the digits network")
        torch.manual_seed(0)
        model = copy.deepcopy(network.model)
        for stage in (PRUNE, DISTILL):
            model = stage.run(model, context(network, bench))
        folder.mkdir(exist_ok=True)
        torch_form.save(model, folder)
    model = torch_form.load(folder)
    assert isinstance(model, nn.Module)
    return model


def context(network: Network, bench: Bench) -> Context:
    """What a stage sees when a recipe runs it."""
    measurer = Measurer(network.task, TARGET, MEASURE, network.folder, bench)
    return Context(
        dir=network.folder, task=network.task, target=TARGET, baseline=network.model, device="cpu", seed=0,
        measurer=measurer,
    )  # fmt: skip


def make_files(network: Network, bench: Bench) -> list[Rival]:
    """Write all int8 files of `network`; return the rivals whose tools are installed."""
    rivals = [rival for rival in NETWORKS[network.name] if importlib.util.find_spec(rival.tool)]
    for made in (network.ours, *map(network.made_by, rivals)):
        made.folder.mkdir(exist_ok=True)
    say(f"{network.name}: optpipe")
    makers.export(OURS.run(copy.deepcopy(network.model), context(network, bench)), network.task, network.ours.path)
    for rival in rivals:
        say(f"{network.name}: {rival.name}")
        with tempfile.TemporaryDirectory() as name:
            exported = Path(name) / "exported.onnx"
            makers.export(copy.deepcopy(network.model), network.task, exported, rewrite=rival.rewritten)
            path = network.made_by(rival).path
            if rival.tool == "nncf":
                makers.nncf_onnx(exported, path, network.task, transformer="transformer" in rival.name)
            else:
                makers.onnxruntime_static(
                    exported, path, network.task, operators=rival.operators, symbolic_shapes=rival.symbolic_shapes
                )
    return rivals


# Times.


def time(network: Network, rival: Rival, batch_size: int, bench: Bench) -> None:
    """Time both files on the first validation samples, unless these very files have been timed before."""
    ours, theirs = network.ours, network.made_by(rival)
    if timing_of(network, rival, batch_size):
        return
    say(f"timing {network.name} against {rival.name} at batch size {batch_size}")
    inputs, _ = next(iter(network.task.validation))
    batch: Any = batch_of(inputs, batch_size)
    path = network.folder / f"inputs_{batch_size}.npz"
    np.savez(path, **{"0": batch.numpy()})
    team = [Contender(made.folder, TARGET.runtime, TARGET.threads) for made in (ours, theirs, ours)]
    comparison = bench.compare(team, [path])[0]
    if comparison.problem:
        say(comparison.problem)
        return
    slowdown = comparison.ratio(1, 0)
    p50 = [float(np.median(comparison.milliseconds(number))) for number in (0, 1)]
    timing = Timing(hashes(ours, theirs), slowdown.value, slowdown.ci95, comparison.ratio(2, 0).value, *p50)
    timing_file(theirs, batch_size).write_text(json.dumps(asdict(timing)))


def timing_of(network: Network, rival: Rival, batch_size: int) -> Timing | None:
    """What was measured of the two files as they are now."""
    ours, theirs = network.ours, network.made_by(rival)
    path = timing_file(theirs, batch_size)
    timing = Timing(**json.loads(path.read_text())) if path.exists() else None
    return timing if timing and timing.files == hashes(ours, theirs) else None


def timing_file(theirs: Made, batch_size: int) -> Path:
    return theirs.folder / f"timing_{batch_size}.json"


def hashes(*files: Made) -> list[str]:
    return [hashlib.sha256(made.path.read_bytes()).hexdigest() for made in files]


# Tables.


def where() -> str:
    machine = environment()
    versions = {**machine["versions"], **nncf_version()}
    told = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{machine['cpu']} ({TARGET.int8_instructions().value}), {TARGET.threads} thread; {told}."


def nncf_version() -> dict[str, str]:
    from importlib.metadata import version

    return {"nncf": version("nncf")} if importlib.util.find_spec("nncf") else {}


def add(report: Report, network: Network, rivals: list[Rival]) -> None:
    """Add the tables of `network`, and where ours is behind."""
    ours = network.ours
    said = ours.predictions(network.task)
    header = ["quantiser", "bytes", "accuracy", "ours − theirs, points [95 %]"]
    for size in BATCH_SIZES:
        header += [f"batch {size}: p50 ms, ours / theirs", "ratio [95 %]"]
    rows = [["optpipe", str(ours.size_bytes), f"{said.value:.2%} of {said.n}", *[""] * (1 + 2 * len(BATCH_SIZES))]]
    for rival in rivals:
        rows.append(row(report, network, rival, said))
    for rival in NETWORKS[network.name]:
        if rival not in rivals:
            rows.append([rival.name, "not installed", *[""] * (len(header) - 2)])
            report.missing.append(f"{network.name} against {rival.name}: install it, `pip install -e '.[compare]'`")
    counted = []
    for made in (ours, *map(network.made_by, rivals)):
        found = made.operators()
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common())
        counted.append([made.maker, str(found.total()), kinds])
    timings = [timing_of(network, rival, size) for rival in rivals for size in BATCH_SIZES]
    noise = max((abs(timing.noise - 1) for timing in timings if timing), default=None)
    report.lines += [f"### {network.name}", markdown(header, rows)]
    report.lines += [f"Ours against itself in other processes: at most {noise:.1%} apart."] if noise is not None else []
    report.lines += [markdown(["quantiser", "operators that run", "which"], counted)]


def row(report: Report, network: Network, rival: Rival, said: Predictions) -> list[str]:
    """The table's row of one rival; what is wrong with ours beside it goes to the report's failures."""
    theirs = network.made_by(rival)
    against = f"{network.name} against {rival.name}"
    judged = quality.summary(said, theirs.predictions(network.task))
    low, high = (100 * bound for bound in judged.delta_ci95)
    if high < 0:
        report.failures.append(f"{against}: {-100 * judged.delta:.2f} points worse")
    if network.ours.size_bytes > theirs.size_bytes:
        report.failures.append(f"{against}: {network.ours.size_bytes - theirs.size_bytes} bytes larger")
    cells = [
        rival.name,
        str(theirs.size_bytes),
        f"{judged.value - judged.delta:.2%}",
        f"{100 * judged.delta:+.2f} [{low:+.2f}, {high:+.2f}]",
    ]
    for size in BATCH_SIZES:
        timing = timing_of(network, rival, size)
        if timing is None:
            cells += ["not timed", ""]
            report.missing.append(f"{against}, batch {size}: not timed")
            continue
        low, high = timing.slowdown_ci95
        cells += [f"{timing.ours_p50_ms:.3f} / {timing.theirs_p50_ms:.3f}"]
        cells += [f"{timing.slowdown:.3f} [{low:.3f}, {high:.3f}]"]
        if low > LIMIT:
            report.failures.append(f"{against}, batch {size}: {timing.slowdown:.3f} times as long, above {LIMIT}")
        elif high > LIMIT:
            report.undecided.append(f"{against}, batch {size}: {timing.slowdown:.3f} [{low:.3f}, {high:.3f}]")
    return cells


def verdict(report: Report) -> str:
    lines = ["Ours is behind:", *(f"- {failure}" for failure in report.failures)]
    if not report.failures:
        lines = [f"Ours is nowhere larger, nowhere worse outside the interval, nowhere proved slower than {LIMIT} ×."]
    if report.undecided:
        lines += [f"Undecided, the interval straddles {LIMIT}:", *(f"- {entry}" for entry in report.undecided)]
    if report.missing:
        lines += ["Not compared:", *(f"- {missing}" for missing in report.missing)]
    return "\n".join(lines)


def plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

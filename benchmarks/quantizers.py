"""optpipe's int8 file against that of ONNX Runtime's own static quantiser: same network, same calibration data.

    python benchmarks/quantizers.py [--output FILE]

Prints a Markdown report, and ends with 1 if ours takes more than LIMIT times as long as theirs by any point estimate.

The networks are the digits reference network as trained, and the same pruned but not trained again: its speed is that
of a trained one, its accuracy would say nothing. Theirs is made as ONNX Runtime's documentation advises: pre-processed,
QDQ, weights per channel. Both files hold uint8 activations and int8 weights; both run in ONNX Runtime, each in worker
processes of its own, in alternating blocks of calls on the same images. Ours is also timed against a second set of
processes with the same file: how far that ratio is from 1 is noise.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from optpipe.context import Context
from optpipe.fingerprint import environment
from optpipe.forms import ExportedFile
from optpipe.forms import onnx as onnx_form
from optpipe.lower import to_onnx, trace
from optpipe.machine import machine_lock
from optpipe.measure.latency import Bench, Comparison, Contender
from optpipe.measure.measurer import Measurer
from optpipe.measure.settings import Measure
from optpipe.measure.statistics import Ratio
from optpipe.progress import say
from optpipe.runtimes.onnxruntime import session_options
from optpipe.stages.prune.channels import Channels  # type: ignore[import-not-found]
from optpipe.stages.quantize.static import Signedness, Static  # type: ignore[import-not-found]
from optpipe.target import InstructionSet, Target
from optpipe.task import Task, batch_of
from optpipe.zoo import digits

LIMIT = 1.05  # time of ours / time of theirs
BATCH_SIZES = (1, 16)
TARGET = Target(threads=1)
MEASURE = Measure(replicas=12, max_seconds=8.0, interval_width=0.02)
PRUNE = Channels(ratio=0.7, round_to=16)
OURS = Static(signedness=Signedness.u8s8)  # the types that theirs is asked for


@dataclass(frozen=True)
class Network:
    """A network, and the folders of the two files that are made of it."""

    name: str
    model: nn.Module
    is_trained: bool
    ours: Path
    theirs: Path


@dataclass(frozen=True)
class Timing:
    """Ours against theirs, and against ours once more, at one batch size."""

    network: Network
    batch_size: int
    comparison: Comparison

    @property
    def slowdown(self) -> Ratio:
        """Time of ours / time of theirs."""
        return self.comparison.ratio(1, 0)

    @property
    def noise(self) -> Ratio:
        """Time of ours / time of ours in other processes."""
        return self.comparison.ratio(2, 0)


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """The task's calibration split as ONNX Runtime's quantiser reads it."""

    def __init__(self, task: Task, input_name: str) -> None:
        self._feeds: Iterator[dict[str, Any]] = ({input_name: array_of(batch)} for batch, _ in task.calibration)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a file to write the report to as well")
    output: Path | None = parser.parse_args().output
    ort.set_default_logger_severity(3)
    task = digits.task()
    with tempfile.TemporaryDirectory() as name, Bench(MEASURE, Path(name) / "workers") as bench:
        folder = Path(name)
        with machine_lock().working():
            networks = make_networks(task, folder, bench)
            for network in networks:
                quantize(network, task, bench)
            files = files_table(networks, task)
        timings = [time(network, size, task, bench) for network in networks for size in BATCH_SIZES]
    text = report(timings, files)
    print(text)
    if output:
        output.write_text(text + "\n")
    return int(any(timing.slowdown.value > LIMIT for timing in timings))


def make_networks(task: Task, folder: Path, bench: Bench) -> list[Network]:
    """The reference network, and a pruned copy that was not trained again."""
    trained = digits.trained()
    pruned = PRUNE.run(copy.deepcopy(trained), context(task, folder, bench, trained))
    made = []
    for name, model in {"reference": trained, "pruned": pruned}.items():
        made.append(Network(name, model, model is trained, folder / name / "ours", folder / name / "theirs"))
        made[-1].ours.mkdir(parents=True)
        made[-1].theirs.mkdir()
    return made


def context(task: Task, folder: Path, bench: Bench, baseline: nn.Module) -> Context:
    """What a stage sees when a recipe runs it."""
    measurer = Measurer(task, TARGET, MEASURE, folder, bench)
    return Context(dir=folder, task=task, target=TARGET, baseline=baseline, device="cpu", seed=0, measurer=measurer)


def quantize(network: Network, task: Task, bench: Bench) -> None:
    """Write both files of `network`."""
    say(f"quantising the {network.name} network")
    ctx = context(task, network.ours, bench, network.model)
    export(OURS.run(copy.deepcopy(network.model), ctx), task, network.ours / onnx_form.FILE)
    with tempfile.TemporaryDirectory() as name:
        exported = Path(name) / "exported.onnx"
        export(copy.deepcopy(network.model), task, exported)
        quantize_theirs(exported, network.theirs / onnx_form.FILE, task)


def quantize_theirs(exported: Path, path: Path, task: Task) -> None:
    """Write to `path` what ONNX Runtime's quantiser makes of the float32 file `exported`."""
    prepared = exported.with_name("prepared.onnx")
    quant_pre_process(str(exported), str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Calibration(task, onnx.load(prepared).graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=TARGET.int8_instructions() is InstructionSet.avx2,  # as ours
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def export(model: nn.Module, task: Task, path: Path) -> None:
    to_onnx(trace(model, task), path, input_names=task.input_names, output_names=task.output_names, rewrite=True)


def time(network: Network, batch_size: int, task: Task, bench: Bench) -> Timing:
    """Time both files on the first validation images."""
    say(f"timing the {network.name} network at batch size {batch_size}")
    inputs, _ = next(iter(task.validation))
    path = network.ours.parent / f"inputs_{batch_size}.npz"
    np.savez(path, **{"0": array_of(batch_of(inputs, batch_size))})
    ours, theirs = (Contender(folder, TARGET.runtime, TARGET.threads) for folder in (network.ours, network.theirs))
    return Timing(network, batch_size, bench.compare([ours, theirs, ours], [path])[0])


def operators(path: Path) -> Counter[str]:
    """Number of operators of each type in the graph that ONNX Runtime makes of the file at `path` and runs."""
    options = session_options(TARGET.threads)
    with tempfile.TemporaryDirectory() as name:
        options.optimized_model_filepath = str(Path(name) / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def array_of(inputs: Any) -> Any:
    assert isinstance(inputs, Tensor)  # the digits are
    return inputs.numpy()


def report(timings: list[Timing], files: str) -> str:
    machine = environment()
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    where = f"{machine['cpu']} ({TARGET.int8_instructions().value}), {TARGET.threads} thread; {versions}."
    return "\n\n".join([where, speed_table(timings), files, verdict(timings)])


def verdict(timings: list[Timing]) -> str:
    slowest = max(timing.slowdown.value for timing in timings)
    intervals = [timing.slowdown.ci95 for timing in timings]
    undecided = sum(low <= LIMIT < high for low, high in intervals)
    doubt = f"; undecided at {undecided} of {len(timings)}, whose interval straddles it" if undecided else ""
    return (
        f"Largest ours / theirs: {slowest:.3f}, {'within' if slowest <= LIMIT else 'above'} the limit {LIMIT}{doubt}."
    )


def speed_table(timings: list[Timing]) -> str:
    header = "network", "batch", "ours / theirs [95 %]", "ours / ours again [95 %]", "ours p50 ms", "theirs p50 ms"
    rows = []
    for timing in timings:
        times = timing.comparison.milliseconds(0), timing.comparison.milliseconds(1)
        p50 = [f"{np.median(calls):.4f}" for calls in times]
        ratios = [shown(timing.slowdown), shown(timing.noise)]
        rows.append([timing.network.name, str(timing.batch_size), *ratios, *p50])
    return markdown(header, rows)


def shown(ratio: Ratio) -> str:
    low, high = ratio.ci95
    return f"{ratio.value:.3f} [{low:.3f}, {high:.3f}]"


def files_table(networks: list[Network], task: Task) -> str:
    header = "network", "quantiser", "bytes", "accuracy (test)", "operators that ONNX Runtime runs"
    rows = []
    for network in networks:
        for maker, folder in {"optpipe": network.ours, "ONNX Runtime": network.theirs}.items():
            path = folder / onnx_form.FILE
            counted = ", ".join(f"{count} {kind}" for kind, count in operators(path).most_common())
            accuracy = accuracy_of(path, task) if network.is_trained else "not trained"
            rows.append([network.name, maker, str(path.stat().st_size), accuracy, counted])
    return markdown(header, rows)


def accuracy_of(path: Path, task: Task) -> str:
    scores = task.evaluate(onnx_form.as_callable(ExportedFile(path, onnx_form.NAME)), "test")
    return f"{float(scores.mean()):.2%} of {len(scores)}"


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())

"""What does `optpipe.load` cost over the engine's own call? Batch 1, NumPy in and out, one thread.

    python benchmarks/load.py                 # about half a minute; exit code 1 if the bar is broken

The bar: a call takes at most 10 % + 3 µs longer than the engine's own, `session.run(None, {name: array})`. Both are
timed in one process, in short blocks that alternate and swap their order, on small networks of about 10 and 100 µs, one
with four inputs. What is added is the median over pairs of neighbouring blocks, with its 95 % bootstrap interval, whose
upper end must hold. Shown beside it without a bar: a second session of the engine's own, which is the noise of this
bench; a pool; and a result that the cache holds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

import optpipe
from optpipe import manifest
from optpipe.forms import ExportedFile
from optpipe.machine import cpu
from optpipe.metrics import top1_accuracy
from optpipe.runtimes import missing
from optpipe.runtimes.onnxruntime import session_options
from optpipe.target import Target
from optpipe.task import Task

SHARE, MICROSECONDS = 0.10, 3.0
PAIRS, BLOCK_SECONDS = 2000, 0.0003  # blocks so short that other processes interrupt few of them

# name: number of inputs, width, layers
NETWORKS = {"small": (1, 96, 3), "four inputs": (4, 96, 3), "medium": (1, 512, 4)}


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call: the engine's own, and what is added, with its 95 % interval."""

    own: float
    added: float
    low: float
    high: float

    @property
    def allowed(self) -> float:
        return SHARE * self.own + MICROSECONDS


def network(inputs: int, width: int, layers: int, path: Path) -> ExportedFile:
    """The sum of `inputs` arrays through `layers` of Gemm and Relu, with a free batch size."""
    random = np.random.default_rng(0)
    names = [f"input_{i}" for i in range(inputs)]
    nodes, weights = [helper.make_node("Sum", names, ["x0"])], []
    for i in range(layers):
        values = random.normal(size=(width, width)).astype(np.float32) / width**0.5
        weights.append(numpy_helper.from_array(values, f"w{i}"))
        nodes += [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"])]
        nodes += [helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"])]
    shape = ["batch", width]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return ExportedFile(path, "onnx")


def deployed(file: ExportedFile, runtime: str, folder: Path, inputs: int, width: int) -> Path:
    """A run's folder with nothing in it but the deployed model."""
    folder.mkdir()
    empty: list = []
    task = Task(
        train=empty, validation=empty, calibration=empty, test=empty,
        example_inputs=tuple(torch.zeros(2, width) for _ in range(inputs)), metric=top1_accuracy(),
    )  # fmt: skip
    manifest.deploy(file, "onnx", folder, Target(runtime=runtime, threads=1), runtime, task)
    return folder


def bare(file: ExportedFile, runtime: str, arrays: list[Any]) -> Callable[[], Any]:
    """The engine's own call, as its documentation shows it."""
    if runtime == "onnxruntime":
        session = ort.InferenceSession(str(file.path), session_options(1), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        if len(names) == 1:
            name, array = names[0], arrays[0]
            return lambda: session.run(None, {name: array})
        a, b, c, d = names
        w, x, y, z = arrays
        return lambda: session.run(None, {a: w, b: x, c: y, d: z})
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(file.path, "CPU", settings).create_infer_request()
    names = [port.any_name for port in request.model_inputs]
    feed = dict(zip(names, arrays, strict=True))
    return lambda: request.infer(feed, share_inputs=True)


def compare(own: Callable[[], Any], ours: Callable[[], Any]) -> Overhead:
    for _ in range(200):
        own(), ours()
    calls = max(1, round(BLOCK_SECONDS / (min(block(own, 10) for _ in range(20)) / 1e6)))
    pairs = []
    for i in range(PAIRS):
        order = (own, ours) if i % 2 else (ours, own)
        first, second = (block(call, calls) for call in order)
        pairs.append((first, second) if i % 2 else (second, first))
    added = np.array([b - a for a, b in pairs])
    drawn = np.random.default_rng(0).integers(len(added), size=(500, len(added)))
    low, high = np.quantile(np.median(added[drawn], axis=1), [0.025, 0.975])
    return Overhead(statistics.median(a for a, _ in pairs), float(np.median(added)), float(low), float(high))


def block(call: Callable[[], Any], calls: int) -> float:
    """Microseconds of one of `calls` calls."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def main() -> int:
    print(f"{cpu()[0]}, ONNX Runtime {ort.__version__}; microseconds of a call at batch 1, 1 thread\n")
    print("engine       network      against its own call   µs     added [95 %]                ratio   allowed")
    broken = 0
    with tempfile.TemporaryDirectory() as scratch:
        for runtime in ("onnxruntime", *([] if missing("openvino") else ["openvino"])):
            for name, (inputs, width, layers) in NETWORKS.items():
                file = network(inputs, width, layers, Path(scratch) / f"{name}.onnx")
                folder = deployed(file, runtime, Path(scratch) / f"{runtime}-{name}", inputs, width)
                random = np.random.default_rng(1)
                arrays = [random.normal(size=(1, width)).astype(np.float32) for _ in range(inputs)]
                own = bare(file, runtime, arrays)
                calls = {"itself again": bare(file, runtime, arrays)}
                for settings in ({}, {"workers": 2}, {"cache": 10}):
                    words = ", ".join(f"{key}={value}" for key, value in settings.items())
                    calls[f"load({words})"] = caller(optpipe.load(folder, **settings), arrays)
                for words, ours in calls.items():
                    found = compare(own, ours)
                    holds = found.high <= found.allowed
                    broken += words == "load()" and not holds
                    bar = f"{found.allowed:6.2f}{'' if holds else '  BROKEN'}" if words == "load()" else ""
                    print(
                        f"{runtime:12} {name:12} {words:16} {found.own:8.2f}  {found.added:8.2f} "
                        f"[{found.low:8.2f}, {found.high:8.2f}]  {1 + found.added / found.own:6.3f}  {bar}",
                        flush=True,
                    )
    return 1 if broken else 0


def caller(model: Any, arrays: list[Any]) -> Callable[[], Any]:
    if len(arrays) == 1:
        array = arrays[0]
        return lambda: model(array)
    w, x, y, z = arrays
    return lambda: model(w, x, y, z)


if __name__ == "__main__":
    sys.exit(main())

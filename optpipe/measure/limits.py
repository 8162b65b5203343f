"""The process that measures this machine's limits: `python -m optpipe.measure.limits`. JSON in and out; no torch."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from optpipe.measure import child
from optpipe.runtimes.onnxruntime import session_options

SIDE = 1024  # of the square matrix that is multiplied: its weights fit into no first-level cache
ROWS = 256
SECONDS = 0.2  # for each limit
WORKING_SETS = (2**18, 2**20, 2**22, 2**24, 2**28)  # bytes: from the second-level cache to memory


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Answer `optpipe.measure.roofline.peaks`."""
    threads = int(request["threads"])
    return {
        "float32": _products("MatMul", np.float32, threads),
        "int8": _products("MatMulInteger", np.uint8, threads),
        "bandwidth": [(size, _copies(size, threads)) for size in WORKING_SETS],
    }


def _products(kind: str, dtype: Any, threads: int) -> float:
    """Operations per second of a large product of matrices, 2 per multiply and add."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-60, 60, (SIDE, SIDE)).astype(np.int8 if dtype == np.uint8 else dtype)
    left = rng.integers(0, 100, (ROWS, SIDE)).astype(dtype)
    types = TensorProto.UINT8 if dtype == np.uint8 else TensorProto.FLOAT
    gives = TensorProto.INT32 if dtype == np.uint8 else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(kind, ["left", "weights"], ["out"])],
        "product",
        [helper.make_tensor_value_info("left", types, left.shape)],
        [helper.make_tensor_value_info("out", gives, [ROWS, SIDE])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )
    return 2 * ROWS * SIDE * SIDE / _seconds(lambda: session.run(None, {"left": left}))


def _copies(working_set: int, threads: int) -> float:
    """Bytes per second, read and written, of threads that each copy a part of half the working set to the other."""
    part = max(1, working_set // 2 // threads)
    pairs = [(np.ones(part, np.uint8), np.zeros(part, np.uint8)) for _ in range(threads)]
    repeats = max(1, 2**22 // working_set)

    def copy(source: Any, target: Any) -> None:
        for _ in range(repeats):
            np.copyto(target, source)

    def together() -> None:
        helpers = [threading.Thread(target=copy, args=pair) for pair in pairs[1:]]
        for thread in helpers:
            thread.start()
        copy(*pairs[0])
        for thread in helpers:
            thread.join()

    return 2 * part * threads * repeats / _seconds(together)


def _seconds(call: Callable[[], Any]) -> float:
    """The fastest tenth of the calls made within SECONDS: a limit is what is reached undisturbed."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < deadline:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(sorted(times)[: max(1, len(times) // 10)])


if __name__ == "__main__":
    child.serve(measure)

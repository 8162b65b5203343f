"""The process that looks into one ONNX file: `python -m optpipe.measure.inspector`. Imports no torch."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from optpipe.measure import child
from optpipe.measure.inspect import BITS, Inspection, Node, Tensor, as_answer
from optpipe.measure.worker import bound_call
from optpipe.runtimes import Runner
from optpipe.runtimes.onnxruntime import session_options

SECONDS = 0.2  # of timed calls, and about as long of profiled ones
MIN_CALLS, MAX_EVENTS = 10, 10_000
WARM_UP_CALLS = 3
CHAIN = 64  # operators that compute next to nothing
PROFILE_TYPES = {"float": "float32", "double": "float64"}  # the profile's names of types that NumPy names otherwise


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request of `optpipe.measure.inspect.inspect`."""
    with tempfile.TemporaryDirectory() as name:
        kept = Path(request["profile"]) if request["profile"] else None
        return as_answer(_inspection(Path(request["model"]), request["inputs"], request["threads"], Path(name), kept))


def _inspection(model: Path, inputs: str, threads: int, folder: Path, kept: Path | None) -> Inspection:
    call_ms, dispatch_ms, clock_ms = overheads(threads, folder)
    named = _named(model)
    plain = _session(named, model, threads, session_options(threads))
    times = timed(bound_call(_runner(plain), inputs), SECONDS)
    del plain  # with its thread pool, before another session is timed
    p50_ms = statistics.median(times)

    options = session_options(threads)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    profiler = _profiling(options, folder)
    session = _session(named, model, threads, profiler)
    graph = onnx.load(folder / "optimised.onnx").graph
    calls = min(len(times), max(MIN_CALLS, MAX_EVENTS // (len(graph.node) + 2)))
    call = bound_call(_runner(session), inputs)
    for _ in range(WARM_UP_CALLS + calls):
        call()
    trace = Path(session.end_profiling())
    if kept:
        shutil.copyfile(trace, kept)
    milliseconds, shapes = _operators(trace, calls)
    names = [(node.name, node.op_type) for node in graph.node]
    if missing := [name for name in names if name not in milliseconds]:
        raise RuntimeError(f"ONNX Runtime's profile has no time of {missing[0][1]} '{missing[0][0]}'")
    nodes = tuple(
        Node(
            name=node.name,
            kind=node.op_type,
            domain=node.domain,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes=_attributes(node),
            kernel_ms=max(
                0.0, milliseconds[node.name, node.op_type] / names.count((node.name, node.op_type)) - clock_ms
            ),
        )
        for node in graph.node
    )
    return Inspection(
        threads=threads,
        nodes=nodes,
        tensors=_tensors(graph, shapes, np.load(inputs)),
        p50_ms=p50_ms,
        call_ms=call_ms,
        dispatch_ms=dispatch_ms,
        clock_ms=clock_ms,
        calls=calls,
    )


def overheads(threads: int, folder: Path) -> tuple[float, float, float]:
    """Milliseconds of an empty call, of an operator's dispatch in it, and of an operator in a profile of it.

    From chains of operators on one number: the slope over their length is the dispatch, what is left the call.
    """
    short, long = (_chain_ms(length, threads) for length in (1, CHAIN + 1))
    dispatch = max(0.0, (long - short) / CHAIN)
    session = ort.InferenceSession(_chain(CHAIN), _as_written(_profiling(session_options(threads), folder)))
    call = _chain_call(session)
    for _ in range(WARM_UP_CALLS + 100):
        call()
    milliseconds, _ = _operators(Path(session.end_profiling()), 100)
    return max(0.0, short - dispatch), dispatch, statistics.mean(milliseconds.values())


def timed(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call made within `seconds` after as long a warm-up, at least MIN_CALLS."""
    begin = time.perf_counter()
    warm = 0
    while warm < WARM_UP_CALLS or time.perf_counter() - begin < seconds / 4:
        call()
        warm += 1
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MIN_CALLS or time.perf_counter() < deadline:
        begun = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begun) / 1e6)
    return times


def _chain_ms(length: int, threads: int) -> float:
    session = ort.InferenceSession(_chain(length), _as_written(session_options(threads)))
    return statistics.median(timed(_chain_call(session), 0.03))


def _chain_call(session: ort.InferenceSession) -> Callable[[], Any]:
    run, one = _runner(session), np.ones(1, np.float32)
    return lambda: run(one)


def _chain(length: int) -> bytes:
    """A model of `length` operators in a row, each on one number."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"], f"neg_{i}") for i in range(length)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _as_written(options: ort.SessionOptions) -> ort.SessionOptions:
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _profiling(options: ort.SessionOptions, folder: Path) -> ort.SessionOptions:
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    return options


def _session(named: bytes, model: Path, threads: int, options: ort.SessionOptions) -> ort.InferenceSession:
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    return ort.InferenceSession(named, options, providers=["CPUExecutionProvider"])


def _runner(session: ort.InferenceSession) -> Runner:
    """As optpipe.runtimes.onnxruntime calls a session, so that times compare."""
    names = [node.name for node in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        outputs: list[Any] = session.run(None, {**dict(zip(names, args, strict=False)), **kwargs})
        return outputs

    return run


def _named(path: Path) -> bytes:
    """The model, every operator of it with a name of its own: the profile knows operators by name only."""
    model = onnx.load(path, load_external_data=False)
    seen: set[str] = set()
    for i, node in enumerate(_all_nodes(model.graph)):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_number_{i}"
        seen.add(node.name)
    return bytes(model.SerializeToString())


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The operators of `graph` and of the branches and loop bodies in it."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found.extend(_all_nodes(inner))
    return found


Shapes = dict[tuple[str, str], list[tuple[str, tuple[int, ...]]]]


def _operators(trace: Path, calls: int) -> tuple[dict[tuple[str, str], float], Shapes]:
    """Time of each operator in one of the last `calls` calls, and the types and shapes of what it gave out.

    The profile has whole microseconds: the mean of the middle half of the calls resolves more than their median.
    """
    runs: list[dict[tuple[str, str], float]] = [defaultdict(float)]
    shapes: Shapes = {}
    for event in json.loads(trace.read_text()):
        if event["name"] == "model_run":
            runs.append(defaultdict(float))
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
            runs[-1][key] += event["dur"] / 1000
            shapes[key] = [_typed(output) for output in event["args"]["output_type_shape"]]
    kept = runs[-calls - 1 : -1]
    return {key: _middle([run.get(key, 0.0) for run in kept]) for key in kept[0]}, shapes


def _typed(output: dict[str, list[int]]) -> tuple[str, tuple[int, ...]]:
    (kind, shape), *_ = output.items()
    return PROFILE_TYPES.get(kind, kind), tuple(shape)


def _middle(values: Sequence[float]) -> float:
    """The mean of the middle half."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return statistics.mean(ordered[quarter : len(ordered) - quarter])


def _tensors(graph: onnx.GraphProto, shapes: Shapes, inputs: Any) -> dict[str, Tensor]:
    """The tensors of a call by name: weights, inputs, and what operators give out."""
    tensors = {initializer.name: _constant(initializer) for initializer in graph.initializer}
    fed = [value.name for value in graph.input if value.name not in tensors]
    for key in inputs:
        name = fed[int(key)] if key.isdigit() else key
        tensors[name] = Tensor(dtype=str(inputs[key].dtype), shape=inputs[key].shape, is_constant=False)
    for node in graph.node:
        found = shapes[node.name, node.op_type]
        named = [name for name in node.output if name]
        if len(found) != len(named):  # an optional output that nothing reads
            continue
        for name, (dtype, shape) in zip(named, found, strict=True):
            if dtype in BITS:
                tensors[name] = Tensor(dtype=dtype, shape=shape, is_constant=False)
    return tensors


def _constant(initializer: onnx.TensorProto) -> Tensor:
    dtype = onnx.TensorProto.DataType.Name(initializer.data_type).lower()
    dtype = PROFILE_TYPES.get(dtype, dtype)
    low = high = None
    if dtype in ("int8", "uint8"):
        values: NDArray[Any] = onnx.numpy_helper.to_array(initializer)
        low, high = (float(values.min()), float(values.max())) if values.size else (None, None)
    return Tensor(dtype=dtype, shape=tuple(initializer.dims), is_constant=True, low=low, high=high)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Numbers, strings and lists of them."""
    found = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, (int, float, str, list)) and not _holds_objects(value):
            found[attribute.name] = value
    return found


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(item, (int, float)) for item in value)


if __name__ == "__main__":
    child.serve(look)

"""What a runtime really executes: ONNX Runtime's own optimised graph of a file, and the time of each of its operators.

The graph is the one that ONNX Runtime writes after all of its rewrites (`optimized_model_filepath`), the times are its
own profile's. Shapes are those of the tensors that the profiled calls had, not inferred ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from optpipe.machine import machine_lock
from optpipe.measure import child

TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of one call."""

    dtype: str  # as NumPy names it: "float32", "uint8", …
    shape: tuple[int, ...]
    is_constant: bool  # a weight: the same in every call
    low: float | None = None  # least and greatest value of an int8 or uint8 weight
    high: float | None = None

    @property
    def bytes(self) -> int:
        return self.size * BITS[self.dtype] // 8

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size


BITS = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "int64": 64, "uint64": 64, "int32": 32, "uint32": 32,
    "int16": 16, "uint16": 16, "int8": 8, "uint8": 8, "bool": 8, "int4": 4, "uint4": 4,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator of the optimised graph. `inputs` and `outputs` name tensors; an absent one is an empty name."""

    name: str
    kind: str  # "QLinearConv"
    domain: str  # "" is ONNX's own
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]  # numbers, strings and lists of them
    kernel_ms: float  # of one call, without what the profiler's clock and the dispatch cost


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A file as ONNX Runtime executes it on this machine.

    p50_ms: of a call, without the profiler.
    call_ms, dispatch_ms: what a call, and an operator in it, cost even where there is nothing to compute; measured in
    the same process on chains of operators on one number.
    clock_ms: what the profile of such an operator shows: taken off each operator's time.
    """

    threads: int
    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    p50_ms: float
    call_ms: float
    dispatch_ms: float
    clock_ms: float
    calls: int  # profiled
    profile: Path | None = field(default=None, compare=False)  # ONNX Runtime's Chrome trace, where it was asked for

    @cached_property
    def overhead_ms(self) -> float:
        """What is not computing: the call, and the dispatch of its operators."""
        return self.call_ms + len(self.nodes) * self.dispatch_ms

    @cached_property
    def total_ms(self) -> float:
        """The call, and all operators with their dispatch: close to p50_ms, and what shares are of."""
        return self.overhead_ms + sum(node.kernel_ms for node in self.nodes)

    def ms(self, node: Node) -> float:
        """Time that a call would be without `node`: its kernel and its dispatch."""
        return node.kernel_ms + self.dispatch_ms

    def share(self, nodes: Sequence[Node]) -> float:
        """The share of a call's time that `nodes` take."""
        return sum(map(self.ms, nodes)) / self.total_ms

    def input(self, node: Node, index: int) -> Tensor | None:
        """The tensor that goes into `node` at a position; None if none does, or nothing is known about it."""
        return self.tensors.get(node.inputs[index]) if index < len(node.inputs) else None

    def output(self, node: Node, index: int = 0) -> Tensor | None:
        """The same of what comes out."""
        return self.tensors.get(node.outputs[index]) if index < len(node.outputs) else None


def inspect(
    model: Path, inputs: Path, threads: int, *, profile: Path | None = None, timeout_seconds: float = TIMEOUT_SECONDS
) -> Inspection:
    """What ONNX Runtime makes of the file `model` and how long each operator takes on the batch in `inputs`.

    inputs: a .npz file; arrays that are named by a number go in by position, the others by name.
    profile: a file to leave ONNX Runtime's own profile in.
    Works in a child process, while the caller sleeps and no other optpipe process computes. Raises MeasureError with
    the child's last words.
    """
    with machine_lock().timing():
        answer = child.ask(
            "optpipe.measure.inspector",
            {
                "model": str(model.resolve()),
                "inputs": str(inputs.resolve()),
                "threads": threads,
                "profile": str(profile.resolve()) if profile else None,
            },
            what="the process that looked into the model in onnxruntime",
            threads=threads,
            timeout_seconds=timeout_seconds,
        )
    tensors = {
        name: Tensor(**{**tensor, "shape": tuple(tensor["shape"])}) for name, tensor in answer["tensors"].items()
    }
    nodes = tuple(
        Node(**{**node, "inputs": tuple(node["inputs"]), "outputs": tuple(node["outputs"])}) for node in answer["nodes"]
    )
    return Inspection(**{**answer, "nodes": nodes, "tensors": tensors}, profile=profile)


def as_answer(inspection: Inspection) -> dict[str, Any]:
    """An Inspection as the JSON that `inspect` reads."""
    answer = asdict(inspection)
    del answer["profile"]
    return answer

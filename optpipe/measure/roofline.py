"""Roofline: how close a model comes to what this machine can do (Williams, Waterman & Patterson 2009).

The machine's limits are measured once, in the target's runtime, and kept: products of matrices in float32 and in int8,
and bandwidth for working sets of several sizes, since what fits into a cache is not bound by memory.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import date

from optpipe.fingerprint import environment
from optpipe.machine import machine_lock, user_cache
from optpipe.measure import child
from optpipe.measure.inspect import Inspection, Node
from optpipe.progress import say
from optpipe.report.schema import Roofline

TIMEOUT_SECONDS = 60.0
# where the weights come in of what multiplies matrices
CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
PRODUCTS = {
    "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1, "QGemm": 3, "QLinearMatMul": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What this machine can do in one runtime with so many threads. Rates are of a second."""

    threads: int
    float32: float  # operations, 2 per multiply and add
    int8: float
    bandwidth: list[tuple[int, float]]  # (bytes of the working set, bytes read and written), smallest set first
    measured: str  # date

    def bytes_per_second(self, working_set: int) -> float:
        """Bandwidth for a working set of so many bytes: that of the next larger one that was measured."""
        return next((rate for size, rate in self.bandwidth if size >= working_set), self.bandwidth[-1][1])


def peaks(threads: int) -> Peaks:
    """This machine's limits, measured the first time. Raises MeasureError if the child process that does it dies."""
    file = user_cache() / f"peaks_{_machine(threads)}.json"
    if file.exists():
        kept = json.loads(file.read_text())
        return Peaks(**{**kept, "bandwidth": [tuple(point) for point in kept["bandwidth"]]})
    say("  measuring what this machine can do at most, once …")
    with machine_lock().timing():
        answer = child.ask(
            "optpipe.measure.limits",
            {"threads": threads},
            what="the process that measures this machine's limits",
            threads=threads,
            timeout_seconds=TIMEOUT_SECONDS,
        )
    found = Peaks(
        threads=threads,
        float32=answer["float32"],
        int8=answer["int8"],
        bandwidth=[(int(size), float(rate)) for size, rate in answer["bandwidth"]],
        measured=date.today().isoformat(),
    )
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(found)))
    partial.rename(file)
    return found


def _machine(threads: int) -> str:
    """What the limits depend on, as a file name."""
    here = environment()
    key = [here[name] for name in ("cpu", "isa", "cores", "governor", "cpu_quota")]
    key += [here["versions"]["onnxruntime"], threads]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def roofline(inspection: Inspection, limits: Peaks) -> Roofline:
    """Where a call of the inspected model stands below the machine's limits."""
    counted = {True: 0, False: 0}  # by whether they are int8
    for node in inspection.nodes:
        counted[is_int8(inspection, node)] += operations(inspection, node)
    moved = sum(traffic(inspection, node) for node in inspection.nodes)
    limit = {
        "compute": (counted[False] / limits.float32 + counted[True] / limits.int8) * 1000,
        "memory": moved / limits.bytes_per_second(moved) * 1000,
        "overhead": inspection.overhead_ms,
    }
    binds = max(limit, key=lambda name: limit[name])
    return Roofline(
        operations=sum(counted.values()),
        bytes=moved,
        compute_ms=limit["compute"],
        memory_ms=limit["memory"],
        overhead_ms=limit["overhead"],
        p50_ms=inspection.p50_ms,
        share_of_limit=limit[binds] / inspection.p50_ms,
        binds=binds,  # type: ignore[arg-type]
    )


def operations(inspection: Inspection, node: Node) -> int:
    """Operations of one operator: 2 per multiply and add of a product, otherwise one per element that comes out."""
    out = inspection.output(node)
    if out is None:
        return 0
    if (at := CONVOLUTIONS.get(node.kind)) is not None:
        weight = inspection.input(node, at)
        if weight is not None and node.kind == "ConvTranspose":
            image = inspection.input(node, 0)
            return 2 * image.size * weight.size // weight.shape[0] if image else 0
        return 2 * out.size * weight.size // weight.shape[0] if weight else 0
    if node.kind in PRODUCTS:
        left = inspection.input(node, 0)
        inner = left.shape[0 if node.attributes.get("transA") else -1] if left and left.shape else 0
        return 2 * out.size * inner
    return out.size


def is_int8(inspection: Inspection, node: Node) -> bool:
    """Whether a product is one of integers."""
    at = CONVOLUTIONS.get(node.kind, PRODUCTS.get(node.kind))
    weight = None if at is None else inspection.input(node, at)
    return weight is not None and weight.dtype in ("int8", "uint8")


def traffic(inspection: Inspection, node: Node) -> int:
    """Bytes that an operator reads and writes."""
    names = {*node.inputs, *node.outputs}
    return sum(inspection.tensors[name].bytes for name in names if name in inspection.tensors)

"""Why is it not faster? Causes read from ONNX Runtime's own optimised graph and profile of a file, largest first.

Every cause is a function that looks for it in an Inspection and says which share of a call's time it accounts for.
Shares may overlap: an operator that stays in float is also why values are converted around it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from optpipe.machine import bound_cores, cpu
from optpipe.measure.inspect import Inspection, Node
from optpipe.measure.roofline import operations as operations_of
from optpipe.measure.roofline import traffic
from optpipe.report.schema import Finding, NotMeasured, Operator

LEAST_SHARE = 0.05  # of a call's time that is worth telling
MOST_OPERATORS = 15
LANES = 16  # output channels that ONNX Runtime's int8 matrix kernels compute at once
DEPTH = 4  # products that a dot-product instruction adds up
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
LAYOUT = {"ReorderInput", "ReorderOutput", "Transpose"}
# integer products of matrices, and where their weights come in
WEIGHTS = {
    "QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3, "ConvInteger": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1, "QAttention": 1,
}  # fmt: skip
PACKED = {"MatMulNBits"}  # whose weights have a layout of their own
# what an operator of the optimised graph is called in the graph that it was made from
PLAIN = {
    "QGemm": "Gemm", "FusedGemm": "Gemm", "FusedConv": "Conv", "FusedMatMul": "MatMul", "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul", "DynamicQuantizeMatMul": "MatMul", "ConvInteger": "Conv",
    "MatMulNBits": "MatMul",
}  # fmt: skip
PRODUCTS = {"Conv", "Gemm", "MatMul"}
DOT_PRODUCTS = ("amx_int8", "avx_vnni_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
REPLACE = (
    "Replace them by operators that ONNX Runtime has int8 kernels for (relu for gelu or silu, batch norm that folds "
    "into a convolution for layer norm), or leave the layers between them in float."
)
QUANTISE_BOTH_SIDES = (
    "Quantise what is before and behind these layers too: ONNX Runtime multiplies in int8 only where inputs and output "
    "are quantised, and what the model gives out is not."
)


def explain(inspection: Inspection, baseline: Inspection | None, isa: frozenset[str] | None = None) -> list[Finding]:
    """The causes why the file is not faster, the largest share of a call's time first.

    baseline: of the unoptimised model in the same runtime, where it could be exported.
    isa: the instruction sets of the processor; by default this machine's.
    """
    isa = cpu()[1] if isa is None else isa
    found = [
        *([same_graph(inspection, baseline)] if baseline else []),  # explains the most, so it comes first among equals
        call_overhead(inspection),
        float_operators(inspection),
        unfused_qdq(inspection),
        layout_conversions(inspection),
        missing_instructions(inspection, isa),
        channels_off_vector_width(inspection),
        *([more_operators(inspection, baseline), slower_kernels(inspection, baseline)] if baseline else []),
    ]
    told = [finding for finding in found if finding and _share(finding) >= LEAST_SHARE]
    crowded = thread_oversubscription(inspection, bound_cores())  # spoils every other figure
    return [*([crowded] if crowded else []), *sorted(told, key=_share, reverse=True)]


def operators(inspection: Inspection) -> list[Operator]:
    """The operators that take longest, slowest first; none where the clock is too coarse for any of them."""
    slowest = sorted(inspection.nodes, key=inspection.ms, reverse=True)[:MOST_OPERATORS]
    total = sum(map(inspection.ms, inspection.nodes))
    if not total:
        return []
    return [
        Operator(
            name=node.name,
            kind=node.kind,
            ms=inspection.ms(node),
            share=inspection.ms(node) / total,
            operations=operations_of(inspection, node),
            bytes=traffic(inspection, node),
        )
        for node in slowest
    ]


def call_overhead(inspection: Inspection) -> Finding | None:
    """A model so small that calling it costs more than its kernels."""
    share = inspection.overhead_ms / inspection.total_ms
    count = len(inspection.nodes)
    return Finding(
        cause="call_overhead",
        share=share,
        evidence=(
            f"the call and its operators add up to {_ms(inspection.total_ms)}, of which {_ms(inspection.overhead_ms)} "
            f"would pass with nothing to compute: {_ms(inspection.call_ms)} for the call and "
            f"{_ms(inspection.dispatch_ms)} for handing out each of {count} operators"
        ),
        remedy="Call it with larger batches, or merge it with the model around it; compression makes no call cheaper.",
    )


def float_operators(inspection: Inspection) -> Finding | None:
    """Operators left in float in a model that has quantised ones."""
    if not any(_is_quantised(node) for node in inspection.nodes):
        return None
    nodes = [node for node in inspection.nodes if _is_float(inspection, node)]
    slowest = max(nodes, key=inspection.ms, default=None)
    return Finding(
        cause="float_operators",
        share=inspection.share(nodes),
        evidence=f"of {len(inspection.nodes)} operators, these compute in float: {_kinds(inspection, nodes)}",
        remedy=REPLACE if not slowest or _plain(slowest) not in PRODUCTS else QUANTISE_BOTH_SIDES,
    )


def unfused_qdq(inspection: Inspection) -> Finding | None:
    """Conversions between float and int8 that no integer operator took in."""
    nodes = [node for node in inspection.nodes if node.kind in CONVERSIONS]
    return Finding(
        cause="unfused_qdq",
        share=inspection.share(nodes),
        evidence=f"conversions between float and int8 are left in the optimised graph: {_kinds(inspection, nodes)}",
        remedy=(
            "Quantise the operators on both sides of each of them, or neither: leave in float the layers whose "
            "neighbours have no int8 kernel."
        ),
    )


def layout_conversions(inspection: Inspection) -> Finding | None:
    """Tensors that are only rearranged in memory."""
    nodes = [node for node in inspection.nodes if node.kind in LAYOUT]
    return Finding(
        cause="layout_conversions",
        share=inspection.share(nodes),
        evidence=f"operators that only rearrange memory: {_kinds(inspection, nodes)}",
        remedy="Keep one layout throughout: no permute between convolutions, and no float operators among int8 ones.",
    )


def missing_instructions(inspection: Inspection, isa: Iterable[str]) -> Finding | None:
    """Integer products that this processor has no instruction for.

    x86 multiplies unsigned by signed bytes. Only AVX-VNNI-INT8 takes two signed ones; without it ONNX Runtime computes
    them in plain C++.
    """
    has = set(isa)
    products = [node for node in inspection.nodes if node.kind in WEIGHTS]
    signed = [node for node in products if _is_signed(inspection, node)]
    if signed and "asimd" not in has and "avx_vnni_int8" not in has:
        return Finding(
            cause="missing_instructions",
            share=inspection.share(signed),
            evidence=(
                f"{len(signed)} of {len(products)} int8 layers multiply signed by signed bytes (S8S8), for which this "
                "processor has no instruction (avx_vnni_int8), so that they run without a vector kernel: "
                f"{_kinds(inspection, signed)}"
            ),
            remedy="Quantise activations to unsigned bytes: quantize.signedness=u8s8.",
        )
    if products and not has.intersection(DOT_PRODUCTS):
        return Finding(
            cause="missing_instructions",
            share=inspection.share(products),
            evidence=(
                f"this processor has no int8 dot product (none of {', '.join(DOT_PRODUCTS)}), which "
                f"int8 layers need: {_kinds(inspection, products)}"
            ),
            remedy="Prune or distil instead, or run where there is one: int8 multiplies little faster than float here.",
        )
    return None


def channels_off_vector_width(inspection: Inspection) -> Finding | None:
    """Integer products whose channels do not fill the vectors that they are computed in."""
    wasted = [(_padding(inspection, node), node) for node in inspection.nodes if node.kind in WEIGHTS]
    wasted = [(share, node) for share, node in wasted if share >= LEAST_SHARE]
    if not wasted:
        return None
    most, worst = max(wasted, key=lambda pair: pair[0] * inspection.ms(pair[1]))
    depth, columns = _matrix(inspection, worst) or (0, 0)
    return Finding(
        cause="channels_off_vector_width",
        share=sum(share * inspection.ms(node) for share, node in wasted) / inspection.total_ms,
        evidence=(
            f"int8 layers that leave lanes of the vectors empty ({LANES} output channels at once, products added by "
            f"{DEPTH}): {len(wasted)}; most in {worst.kind} '{worst.name}': {columns} output channels per group, "
            f"{depth} products each, {most:.0%} empty"
        ),
        remedy=f"Make channels (of each group) a multiple of {LANES}: prune.round_to={LANES}, or fewer, wider groups.",
    )


def same_graph(inspection: Inspection, baseline: Inspection) -> Finding | None:
    """Nothing that was changed is left in what the runtime executes."""
    ours, theirs = (
        Counter((node.kind, out.shape, out.dtype) for node in seen.nodes if (out := seen.output(node)))
        for seen in (inspection, baseline)
    )
    if ours != theirs:
        return None
    return Finding(
        cause="same_graph",
        share=1.0,
        evidence=f"after its own rewrites ONNX Runtime executes the same {len(inspection.nodes)} operators as for the "
        "unoptimised model, on tensors of the same shapes and types",
        remedy="Nothing to mend: the runtime does by itself what this step does; the steps after it may still need it.",
    )


def more_operators(inspection: Inspection, baseline: Inspection) -> Finding | None:
    """Operators beside the conversions that only this graph executes: fusions of the float graph that came apart."""
    added, gone = _only_in(inspection, baseline), _only_in(baseline, inspection)
    ms = sum(map(inspection.ms, added)) - sum(map(baseline.ms, gone))
    if not added or ms <= 0:
        return None
    instead = f" instead of {_kinds(baseline, gone)}" if gone else ""
    return Finding(
        cause="more_operators",
        share=ms / inspection.total_ms,
        evidence=(
            "operators that the float model does not execute, beside conversions: "
            f"{_kinds(inspection, added)}{instead}; {len(inspection.nodes)} operators in all, {len(baseline.nodes)} in "
            "the float model"
        ),
        remedy="Leave in float the layers around them, so that ONNX Runtime can fuse them again.",
    )


def slower_kernels(inspection: Inspection, baseline: Inspection) -> Finding | None:
    """Integer kernels that take longer than the float ones that they stand for."""
    ours, theirs = _ms_by_plain_kind(inspection), _ms_by_plain_kind(baseline)
    quantised = {_plain(node): node.kind for node in inspection.nodes if _is_quantised(node)}
    lost = {kind: ours[kind] - theirs[kind] for kind in quantised if 0 < theirs.get(kind, 0.0) < ours[kind]}
    if not lost:
        return None
    said = (
        f"{quantised[kind]} {_ms(ours[kind])} for {kind} {_ms(theirs[kind])}"
        for kind in sorted(lost, key=lost.__getitem__)
    )
    return Finding(
        cause="slower_kernels",
        share=sum(lost.values()) / inspection.total_ms,
        evidence=f"integer kernels take longer than the float ones that they replace: {', '.join(said)}",
        remedy="Leave these layers in float.",
    )


def thread_oversubscription(inspection: Inspection, cores: int) -> Finding | None:
    """More threads than cores."""
    if inspection.threads <= cores:
        return None
    return Finding(
        cause="thread_oversubscription",
        share=NotMeasured("threads that wait for a core are in no operator's time"),
        evidence=f"a call runs on {inspection.threads} threads, but this process may use {cores} cores",
        remedy=f"target.threads={cores}, or fewer.",
    )


def _share(finding: Finding) -> float:
    assert isinstance(finding.share, float)
    return finding.share


def _plain(node: Node) -> str:
    return PLAIN.get(node.kind, node.kind.removeprefix("QLinear"))


def _ms_by_plain_kind(inspection: Inspection) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for node in inspection.nodes:
        found[_plain(node)] += inspection.ms(node)
    return found


def _only_in(one: Inspection, other: Inspection) -> list[Node]:
    """Operators beside conversions of which `one` has more than `other`, by kind; those that take least."""
    left = Counter(map(_plain, other.nodes))
    found = []
    for node in sorted(one.nodes, key=one.ms, reverse=True):
        left[_plain(node)] -= 1
        if left[_plain(node)] < 0 and node.kind not in CONVERSIONS | LAYOUT:
            found.append(node)
    return found


def _is_quantised(node: Node) -> bool:
    return node.kind.startswith("QLinear") or node.kind in WEIGHTS or node.kind in PACKED


def _is_float(inspection: Inspection, node: Node) -> bool:
    """Whether `node` computes in float; what only moves values, or converts them, does not compute."""
    if _is_quantised(node) or node.kind in CONVERSIONS | LAYOUT:
        return False
    output = inspection.output(node)
    return output is not None and output.dtype.startswith(("float", "bfloat"))


def _is_signed(inspection: Inspection, node: Node) -> bool:
    tensors = inspection.input(node, 0), inspection.input(node, WEIGHTS[node.kind])
    return all(tensor is not None and tensor.dtype == "int8" for tensor in tensors)


def _padding(inspection: Inspection, node: Node) -> float:
    """The share of the multiplications of `node` that only fill vectors."""
    matrix = _matrix(inspection, node)
    if matrix is None:
        return 0.0
    depth, columns = matrix
    return 1 - depth / (math.ceil(depth / DEPTH) * DEPTH) * columns / (math.ceil(columns / LANES) * LANES)


def _matrix(inspection: Inspection, node: Node) -> tuple[int, int] | None:
    """Rows and columns of the weights of `node` as a matrix; None where it has none, or a kernel of its own.

    ONNX Runtime computes a convolution as the product of patches and weights, group by group; one with one channel in
    each group has a kernel that vectorises over groups.
    """
    weights = inspection.input(node, WEIGHTS[node.kind])
    if weights is None or len(weights.shape) < 2:
        return None
    if "Conv" not in node.kind:
        transposed = bool(node.attributes.get("transB", 0))
        depth, columns = weights.shape[-2:] if not transposed else weights.shape[:-3:-1]
        return depth, columns
    group = int(node.attributes.get("group", 1))
    channels, depth = weights.shape[0], math.prod(weights.shape[1:])
    return None if weights.shape[1] == 1 and group == channels else (depth, channels // group)


def _kinds(inspection: Inspection, nodes: Sequence[Node]) -> str:
    """The kinds of `nodes`, those that take longest first: "3 Erf (0.21 ms), 1 Softmax (0.05 ms)"."""
    times: dict[str, float] = defaultdict(float)
    for node in nodes:
        times[node.kind] += inspection.ms(node)
    counts = Counter(node.kind for node in nodes)
    slowest = sorted(times, key=times.__getitem__, reverse=True)
    said = [f"{counts[kind]} {kind} ({_ms(times[kind])})" for kind in slowest[:5]]
    rest = sum(times[kind] for kind in slowest[5:])
    return ", ".join([*said, f"others ({_ms(rest)})"] if len(slowest) > 5 else said)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds * 1000:.1f} µs" if milliseconds < 0.1 else f"{milliseconds:.3g} ms"

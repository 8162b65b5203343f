"""A graph in the operators that runtimes have integer kernels for: what is rewritten before it is quantised, and after.

Everything here computes the same as what it replaces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .placement import (
    CLAMPING,
    INT32_MAX,
    WEIGHTED,
    aten,
    held,
    is_float_tensor,
    name_layers,
    only_user,
)

# every value by itself, or with its like in another tensor of the same shape
BY_VALUE = {
    aten.add.Tensor, aten.mul.Tensor, aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default,
    aten.sigmoid.default, aten.dropout.default, aten.hardtanh.default,
}  # fmt: skip


def make_ready(graph: GraphModule) -> None:
    """Write `graph` in the operators that the runtime has integer kernels for; it computes the same."""
    name_layers(graph)
    split_products(graph)
    give_own_biases(graph)
    flatten_linears(graph)
    graph.graph.lint()
    graph.recompile()


def split_products(graph: GraphModule) -> None:
    """A scaled product with something added to it becomes a product, and a sum in float."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.baddbmm.default:
            continue
        added, left, right = node.args
        with graph.graph.inserting_before(node):
            found = graph.graph.call_function(aten.bmm.default, (left, right))
            found.meta = dict(node.meta)
            for name, value in (("alpha", found), ("beta", added)):
                if (factor := node.kwargs.get(name, 1)) != 1:
                    scaled = graph.graph.call_function(aten.mul.Tensor, (value, factor))
                    scaled.meta = dict(value.meta)
                    found, added = (scaled, added) if name == "alpha" else (found, scaled)
            total = graph.graph.call_function(aten.add.Tensor, (found, added))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.graph.erase_node(node)


def give_own_biases(graph: GraphModule) -> None:
    """A layer that is used twice reads its bias from two nodes.

    A bias has the scale of the products that it is added to, and so one for each input that the layer is given. ONNX
    Runtime leaves a convolution whose bias has another scale in float, and computes a wrong Gemm.
    """
    for node in list(graph.graph.nodes):
        bias = node.args[2] if node.target in WEIGHTED and len(node.args) > 2 else None
        if isinstance(bias, Node) and bias.op == "get_attr" and len(bias.users) > 1:
            with graph.graph.inserting_before(node):
                own = graph.graph.get_attr(str(bias.target))
            own.meta = dict(bias.meta)
            node.update_arg(2, own)


def flatten_linears(graph: GraphModule) -> None:
    """Let linear layers read matrices, and what works on single rows or values go on with theirs.

    ONNX Runtime then runs them as QGemm, which adds the bias in int32; a product of a higher rank becomes
    MatMulIntegerToFloat and a second operator that adds the bias.
    """
    flat: dict[Node, Node] = {}

    def matrix(source: Node) -> Node:
        if source not in flat:
            with graph.graph.inserting_after(source):
                flat[source] = _reshape(graph, source, [-1, source.meta["val"].shape[-1]])
        return flat[source]

    rewritten = []
    for node in list(graph.graph.nodes):
        is_linear = node.target is aten.linear.default and node.meta["val"].dim() > 2
        if not is_linear and not (_is_by_row(node) and any(operand in flat for operand in node.args[:2])):
            continue
        count = 1 if is_linear else 2
        arguments = [matrix(a) if i < count and is_float_tensor(a) else a for i, a in enumerate(node.args)]
        with graph.graph.inserting_after(node):
            flat[node] = graph.graph.call_function(node.target, tuple(arguments), dict(node.kwargs))
        flat[node].meta = {**node.meta, "val": node.meta["val"].reshape(-1, node.meta["val"].shape[-1])}
        rewritten.append(node)
    for node in reversed(rewritten):
        if node.users:
            shape = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
            with graph.graph.inserting_after(flat[node]):
                node.replace_all_uses_with(_reshape(graph, flat[node], shape))
        graph.graph.erase_node(node)


def _is_by_row(node: Node) -> bool:
    """Whether `node` computes each row, or each value, of its float operands by itself; they are of one shape."""
    operands = [operand for operand in node.args[:2] if is_float_tensor(operand)]
    if node.target is aten.layer_norm.default:
        sizes: Any = node.args[1]
        return len(sizes) == 1
    if node.target not in BY_VALUE or any(isinstance(operand, Node) for operand in node.args[len(operands) :]):
        return False
    shape = node.meta["val"].shape
    return len(shape) > 2 and all(operand.meta["val"].shape == shape for operand in operands)  # type: ignore[union-attr]


def _reshape(graph: GraphModule, source: Node, shape: list[int]) -> Node:
    reshaped = graph.graph.call_function(aten.reshape.default, (source, shape))
    reshaped.meta = {**source.meta, "val": source.meta["val"].reshape(shape)}
    return reshaped


def look_up_integers(converted: GraphModule) -> int:
    """Look rows up in int8 tables, and only then scale them; return how many tables there are.

    PT2E converts the whole table to float at every call.
    """
    tables = 0
    for node in list(converted.graph.nodes):
        table = node.args[0] if node.target is aten.embedding.default else None
        if table is None or "dequantize_per_channel" not in str(table.target):
            continue
        rows, scales, indices = table.args[0], table.args[1], node.args[1]
        with converted.graph.inserting_before(node):
            column = converted.graph.call_function(aten.unsqueeze.default, (scales, 1))
            integers = converted.graph.call_function(aten.embedding.default, (rows, indices))
            scale = converted.graph.call_function(aten.embedding.default, (column, indices))
            floats = converted.graph.call_function(aten.to.dtype, (integers, torch.float32))
            found = converted.graph.call_function(aten.mul.Tensor, (floats, scale))
        found.meta = dict(node.meta)
        node.replace_all_uses_with(found)
        tables += 1
    converted.graph.eliminate_dead_code()
    converted.recompile()
    return tables


def keep_out_of_integers(converted: GraphModule) -> int:
    """Let layers that were to stay float stay it in ONNX Runtime too; return how many needed help.

    Between quantised tensors it rounds the weights of a float layer by itself, to one scale for the tensor
    (`WeightBiasQuantization`), unless something but a relu or a clip reads the output. A leaky relu of slope 1 changes
    no value, and is fused into the layer.
    """
    helped = 0
    for node in list(converted.graph.nodes):
        if node.target not in WEIGHTED:
            continue
        read, weight = node.args[:2]
        if "dequantize" in str(weight.target) or "dequantize" not in str(read.target) or not _is_rounded(node):
            continue
        with converted.graph.inserting_after(node):
            same = converted.graph.call_function(aten.leaky_relu.default, (node, 1.0))
        same.meta = dict(node.meta)
        node.replace_all_uses_with(same, delete_user_cb=lambda user, same=same: user is not same)
        helped += 1
    converted.recompile()
    return helped


def _is_rounded(node: Node) -> bool:
    """Whether the output of `node`, behind relus that alone read it, is quantised."""
    user = only_user(node)
    while user is not None and user.target in CLAMPING:
        user = only_user(user)
    return user is not None and "quantize_per_tensor" in str(user.target)


def make_room_for_biases(prepared: GraphModule) -> int:
    """Widen the weight ranges of calibrated observers where a bias would not fit; return how many channels that took.

    A bias is stored in int32 in steps of (activation scale · weight scale). Where a channel's weights are next to zero
    that step is so small that int32 would clip the bias, and with it the channel's whole output.
    """
    widened = 0
    for node in prepared.graph.nodes:
        if node.target not in WEIGHTED or len(node.args) < 3:
            continue
        arguments: Any = node.args[:3]
        activation, weight, bias = arguments
        if bias is None or bias.op != "call_module" or bias.args[0].op != "get_attr":
            continue  # one behind which a batch norm is trained is known once that is folded
        activation_observer = held(prepared, activation)
        weight_observer = held(prepared, weight)
        weight_observer = getattr(weight_observer, "activation_post_process", weight_observer)  # of a fake quantiser
        activation_scale, _ = activation_observer.calculate_qparams()
        values = held(prepared, bias.args[0]).detach()
        limit = values.abs() / (INT32_MAX / 2) / activation_scale * weight_observer.quant_max
        low, high = weight_observer.min_val, weight_observer.max_val
        limit = limit if high.dim() else limit.max()
        widened += int((limit > torch.maximum(high, -low)).sum())
        high.copy_(torch.maximum(high, limit))
        low.copy_(torch.minimum(low, -limit))
    return widened

"""Rewrites of an exported ONNX graph: operators that runtimes have the best kernels for, and nothing stored twice.

The results are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

SWAPPED = [0, 2, 1, 3]  # (n, length, heads, width) <-> (n, heads, length, width)


def use_global_pooling(model: ir.Model) -> None:
    """ReduceMean over all spatial axes becomes GlobalAveragePool.

    The exporter writes the former for adaptive pooling to 1×1; ONNX Runtime has an int8 kernel for the latter only.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        if node.op_type != "ReduceMean" or len(node.inputs) != 2 or not node.inputs[0] or not node.inputs[1]:
            continue
        shape, axes = node.inputs[0].shape, ir.convenience.get_const_tensor(node.inputs[1])
        if shape is None or axes is None or len(shape) < 3:
            continue
        rank = len(shape)
        if {int(axis) % rank for axis in axes.numpy().flatten()} != set(range(2, rank)):
            continue
        pooled = ir.node("GlobalAveragePool", inputs=[node.inputs[0]])
        new = [pooled]
        keepdims = node.attributes.get("keepdims")
        if keepdims is not None and keepdims.as_int() == 0:
            new.append(ir.node("Flatten", inputs=[pooled.outputs[0]], attributes={"axis": 1}))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, node.outputs, new[-1].outputs)


def use_packed_attention(model: ir.Model) -> None:
    """Attention reads (n, length, heads · width) where it read four transposed tensors, and masks have all their rows.

    The operator of opset 23 splits the heads itself; the transposes around it then have no reader. ONNX Runtime 1.31
    does not broadcast a mask over the queries, though the specification asks for it.
    """
    import onnx_ir.passes.common as passes

    masks: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        _expand_mask(model, node, masks)
        _pack(model, node)
    _merge_reshapes(model)
    passes.RemoveUnusedNodesPass()(model)


def derive_bias_scales(model: ir.Model) -> None:
    """The scale of an int32 bias becomes the product that it is, of two scales that the file holds anyway.

    PT2E writes it out, and zero points that are all zero: together twice the size of the bias. Runtimes fold the
    product when they load the file.
    """
    import numpy as np
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    for node in [node for node in model.graph if node.op_type in ("Conv", "Gemm") and len(node.inputs) == 3]:
        operands = [value.producer() if value is not None else None for value in node.inputs]
        activation, weight, bias = operands
        scales = [_constant_input(operand, 1) for operand in operands]
        zero_point = _constant_input(bias, 2)
        if activation is None or weight is None or bias is None or zero_point is None or zero_point.any():
            continue
        if any(scale is None for scale in scales) or not np.array_equal(scales[0] * scales[1], scales[2]):
            continue
        product = ir.node("Mul", inputs=[weight.inputs[1], activation.inputs[1]])
        product.outputs[0].name = f"{bias.outputs[0].name}_scale"
        model.graph.insert_before(bias, product)
        bias.replace_input_with(1, product.outputs[0])
        bias.resize_inputs(2)
    passes.RemoveUnusedNodesPass()(model)


def _constant_input(node: ir.Node | None, index: int) -> Any:
    """What a DequantizeLinear reads there, an array; None where that is not constant or `node` something else."""
    import onnx_ir as ir

    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) <= index:
        return None
    value = node.inputs[index]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None


def _merge_reshapes(model: ir.Model) -> None:
    """A reshape of a reshape reads the tensor before both."""
    import onnx_ir as ir

    for node in model.graph:
        producer = node.inputs[0].producer() if node.op_type == "Reshape" and node.inputs[0] is not None else None
        wanted = node.inputs[1] if producer is not None else None
        shape = ir.convenience.get_const_tensor(wanted) if wanted is not None else None
        if producer is None or producer.op_type != "Reshape" or shape is None or 0 in shape.numpy():
            continue  # a 0 stands for a size of the input that it has now
        node.replace_input_with(0, producer.inputs[0])


def _expand_mask(model: ir.Model, node: ir.Node, masks: dict[tuple[ir.Value, int], ir.Value]) -> None:
    """Give `node` a mask with a row for each query; `masks` holds those that were expanded before."""
    import onnx_ir as ir

    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or query is None or mask.shape is None or query.shape is None or mask.shape[-2] != 1:
        return
    length = query.shape[-2]
    if not isinstance(length, int) or length == 1:
        return
    if (mask, length) not in masks:
        shape = _constant(model, [*[1] * (len(mask.shape) - 2), length, 1], f"{mask.name}_rows_{length}")
        expand = ir.node("Expand", inputs=[mask, shape])
        expand.outputs[0].name = f"{mask.name}_{length}_rows"
        model.graph.insert_before(node, expand)
        masks[mask, length] = expand.outputs[0]
    node.replace_input_with(3, masks[mask, length])


@dataclass(frozen=True)
class Heads:
    """A tensor of shape (n, length, count, width) that a transpose turned into (n, count, length, width)."""

    source: ir.Value
    length: int
    count: int
    width: int

    @classmethod
    def of(cls, value: ir.Value | None) -> Heads | None:
        """Those of `value`; None if no such transpose made it, or a size is not known."""
        producer = value.producer() if value is not None else None
        source = producer.inputs[0] if producer is not None and _is_swap(producer) else None
        sizes = list(source.shape)[1:] if source is not None and source.shape is not None else []
        known = [size for size in sizes if isinstance(size, int)]
        return cls(source, *known) if source is not None and len(known) == len(sizes) == 3 else None


def _pack(model: ir.Model, node: ir.Node) -> None:
    """Read and write what is before and behind the transposes around `node`, where there are such."""
    import onnx_ir as ir

    readers = [use.node for use in node.outputs[0].uses()]
    query, key, value = (Heads.of(tensor) for tensor in node.inputs[:3])
    if len(node.outputs) > 1 or len(readers) != 1 or not _is_swap(readers[0]) or not (query and key and value):
        return
    name = str(node.outputs[0].name)
    packed = []
    for part, heads in {"query": query, "key": key, "value": value}.items():
        shape = _constant(model, [-1, heads.length, heads.count * heads.width], f"{name}_{part}_shape")
        packed.append(ir.node("Reshape", inputs=[heads.source, shape]))
        packed[-1].outputs[0].name = f"{name}_{part}"
    attention = ir.node("Attention", inputs=[*(reshape.outputs[0] for reshape in packed), *node.inputs[3:]])
    attention.attributes.update(node.attributes)
    for attribute in (ir.AttrInt64("q_num_heads", query.count), ir.AttrInt64("kv_num_heads", key.count)):
        attention.attributes[attribute.name] = attribute
    attention.outputs[0].name = f"{name}_packed"
    shape = _constant(model, [-1, query.length, query.count, value.width], f"{name}_shape")
    unpacked = ir.node("Reshape", inputs=[attention.outputs[0], shape])
    unpacked.outputs[0].name = f"{name}_unpacked"
    model.graph.insert_before(node, [*packed, attention, unpacked])
    ir.convenience.replace_all_uses_with(readers[0].outputs[0], unpacked.outputs[0])


def _is_swap(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return node.op_type == "Transpose" and order is not None and list(order.as_ints()) == SWAPPED


def _constant(model: ir.Model, values: list[int], name: str) -> ir.Value:
    """A constant vector of integers in `model`."""
    import numpy as np
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(np.array(values, dtype=np.int64), name=name))
    model.graph.register_initializer(value)
    return value

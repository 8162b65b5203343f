"""Placement: which tensors of a graph are quantised, so that the target's runtime computes in integers.

ONNX Runtime and OpenVINO fuse `dequantise → operator → quantise` into one integer operator only if all of its inputs,
and for most operators the output, are quantised, and only for some operators. This quantizer annotates just those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from .scheme import Scheme

aten = torch.ops.aten
INT32_MAX = 2**31 - 1
LAYER = "optpipe_layer"  # in a node's meta data
SMALLEST_TABLE = 1024  # values; int8 saves nothing worth an operator below

CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
GROUPS = 6  # position among the arguments of a transposed convolution
WEIGHTED = {*CONVOLUTIONS, *TRANSPOSED, aten.linear.default}  # weight and bias are arguments 1 and 2
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
ELEMENTWISE = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
# integer operators of one input
UNARY = {
    aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.sigmoid.default, aten.leaky_relu.default,
    aten.leaky_relu_.default,
}  # fmt: skip
# the output holds the input's values, so it has the input's scale
MOVING = {
    aten.max_pool2d.default, aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default, aten.unflatten.int, aten.contiguous.default,
}  # fmt: skip
# the range of a quantised output can stand for these
CLAMPING = {aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
NORMS = {aten.batch_norm.default}  # folded into the convolution that it reads alone
# operators with weights, or of two activations, that ONNX Runtime computes in float whatever their types
RECURRENT = "ONNX Runtime has no recurrent operator with calibrated int8"
FLOAT_ONLY: dict[Any, str] = {
    aten.lstm.input: RECURRENT, aten.gru.input: RECURRENT, aten.rnn_tanh.input: RECURRENT,
    aten.rnn_relu.input: RECURRENT,
    aten.scaled_dot_product_attention.default: "ONNX Runtime computes it as one operator, which it has in float only",
    aten.einsum.default: "ONNX Runtime has no einsum in int8; write it as a matrix product or a linear layer",
    aten.embedding_bag.padding_idx: "ONNX Runtime has no embedding bag in int8; use an embedding and a mean or a sum",
    aten.bilinear.default: "ONNX Runtime has no bilinear layer in int8",
}  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """What an engine computes in integers."""

    float_only: dict[Any, str]  # operators that stay in float, and why
    rounds_float: bool = False  # whether it rounds the weights of float layers between quantised tensors


ONNX_RUNTIME = Kernels(
    {**FLOAT_ONLY, **dict.fromkeys(TRANSPOSED, "ONNX Runtime has no transposed convolution in int8")},
    rounds_float=True,
)
OPENVINO = Kernels(dict.fromkeys(FLOAT_ONLY, "there is no placement for OpenVINO's int8 of it"))


class IntegerQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates a PT2E graph for an engine's integer operators.

    keep: names of layers that stay float (see `layers`).
    integer_nodes: the operators that will compute in integers, in the graph's order, once `annotate` has run.
    table_nodes: those that will read rows of integers, and compute in float.
    left_in_float: the layers that will compute in float though nobody asked for it, and why; from then on too.
    """

    def __init__(self, scheme: Scheme, keep: Iterable[str] = (), kernels: Kernels = ONNX_RUNTIME) -> None:
        self.scheme, self.kernels = scheme, kernels
        self.keep = set(keep)
        self.integer_nodes: dict[Node, None] = {}
        self.table_nodes: dict[Node, None] = {}
        self.left_in_float: dict[str, str] = {}

    @property
    def compute_layers(self) -> list[str]:
        """The layer of each operator with weights, and matrix product, that was annotated."""
        return [layer_of(node) for node in self.integer_nodes if node.target in WEIGHTED | PRODUCTS]

    def annotate(self, model: GraphModule) -> GraphModule:
        calls = [node for node in model.graph.nodes if node.op == "call_function"]
        for node in calls:
            if layer_of(node) in self.keep:
                continue
            if self._runs_in_integers(node):
                self.integer_nodes[node] = None
            elif reason := self._float_reason(node):
                self.left_in_float[f"'{layer_of(node)}' ({kind_of(node)})"] = reason
        for node in self.integer_nodes:
            self._annotate(node)
        for node in calls:
            if node.target in MOVING and _is_quantised(node.args[0]):
                self._moving(node)
            elif node not in self.integer_nodes and layer_of(node) not in self.keep and (read := _tables(model, node)):
                _set(node, dict.fromkeys(read, self.scheme.row_spec), None)
                self.table_nodes[node] = None
        return model

    def validate(self, model: GraphModule) -> None:
        """Every annotation follows from the graph; nothing can be inconsistent."""

    def _runs_in_integers(self, node: Node) -> bool:
        """Whether the runtime has an integer kernel for `node` whose inputs are cheap to have in integers.

        A sum with a float operand, such as a transformer's residual stream, stays float: rounding it would cost
        quality and two conversions, and save nothing.
        """
        if node.target in self.kernels.float_only or _is_grouped_transposed(node):
            return False
        if node.target in WEIGHTED:
            return isinstance(node.args[0], Node) and isinstance(node.args[1], Node) and node.args[1].op == "get_attr"
        if node.target in PRODUCTS:
            return all(is_float_tensor(argument) for argument in node.args[:2])
        if node.target in ELEMENTWISE:
            operands = node.args[:2]
            if any(user.target in SOFTMAX for user in node.users):
                return False  # scores with a mask added: its -1e4, or -inf, would leave them one step of a range
            return all(map(is_float_tensor, operands)) and all(
                self._is_integer(operand) or _is_broadcast(operand, node) for operand in operands
            )
        if node.target is aten.cat.default:
            return all(map(self._is_integer, _tensors(node)))
        return node.target in UNARY and self._is_integer(node.args[0])

    def _is_integer(self, node: Any) -> bool:
        """Whether the values of `node` come from an integer operator, or from outside of the graph."""
        while isinstance(node, Node) and node.target in MOVING | CLAMPING | NORMS:
            node = node.args[0]
        return is_float_tensor(node) and (node in self.integer_nodes or node.op == "placeholder")

    def _annotate(self, node: Node) -> None:
        """Quantise the inputs, and the output where the next operator or the kernel wants integers.

        A batch norm and a relu that alone read the output are fused into the operator. A linear layer whose output is
        read in float only, or returned, writes it unrounded.
        """
        inputs: dict[Any, Any] = {tensor: self._spec(tensor) for tensor in _tensors(node)}
        if node.target in WEIGHTED:
            inputs[node.args[1]] = self.scheme.column_spec if node.target in TRANSPOSED else self.scheme.weight_spec
            bias = node.args[2] if len(node.args) > 2 else None
            if isinstance(bias, Node):
                inputs[bias] = _bias_spec(node, node.args[0], node.args[1], self.scheme.per_channel)
        last = node
        for fused in (NORMS if node.target in CONVOLUTIONS | TRANSPOSED else set(), CLAMPING):
            if (user := only_user(last)) is not None and user.target in fused:
                last = user
        can_write_float = node.target is aten.linear.default or node.target in PRODUCTS
        writes_float = can_write_float and not any(map(self._reads_integers, last.users))
        is_returned = any(user.op == "output" for user in last.users) and node.target not in CONVOLUTIONS
        output = None if writes_float or is_returned else self._spec(last)
        _set(node, inputs, output if last is node else None)
        if last is not node:
            _set(last, {}, output)

    def _reads_integers(self, node: Node) -> bool:
        """Whether `node`, or what reads its unchanged values, computes in integers."""
        if node.target in MOVING:
            return any(map(self._reads_integers, node.users))
        return node in self.integer_nodes

    def _float_reason(self, node: Node) -> str:
        """Why `node`, which has weights or is a product, cannot run in integers; empty for other operators."""
        if node.target in self.kernels.float_only:
            return self.kernels.float_only[node.target]
        if _is_grouped_transposed(node):
            return "OpenVINO has transposed convolutions in int8 only without groups"
        return "its weight is computed while the model runs, and so not known before" if node.target in WEIGHTED else ""

    def _moving(self, node: Node) -> None:
        if not any(user.op == "output" for user in node.users):
            source = node.args[0]
            _set(node, {source: self._spec(source)}, SharedQuantizationSpec((source, node)))

    def _spec(self, node: Any) -> QuantizationSpec:
        """That of the values which `node` gives."""
        while node.target in MOVING:
            node = node.args[0]
        return self.scheme.clamped_spec if node.target in CLAMPING else self.scheme.activation_spec


def layer_of(node: Node) -> str:
    """The name of the module that `node` belongs to, or the node's own outside of any.

    What is put in the place of a node has its name too (see `name_layers`).
    """
    if LAYER in node.meta:
        return str(node.meta[LAYER])
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0] if stack else "") or node.name


def name_layers(graph: GraphModule) -> None:
    """Let every operator carry its layer's name, which goes with its meta data to what replaces it."""
    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.meta[LAYER] = layer_of(node)


def layers(graph: GraphModule) -> list[str]:
    """Names of the layers with weights, tables or matrix products, in order."""
    nodes = [node for node in graph.graph.nodes if node.target in WEIGHTED | PRODUCTS or _tables(graph, node)]
    return list(dict.fromkeys(map(layer_of, nodes)))


def held(graph: GraphModule, node: Node) -> Any:
    """The submodule or tensor of `graph` that `node` calls or reads."""
    return attrgetter(str(node.target))(graph)


def _bias_spec(node: Node, activation: Any, weight: Any, per_channel: bool) -> DerivedQuantizationSpec:
    """int32, with the scale of the products that it is added to; without it ONNX Runtime leaves Gemm in float."""

    def scale_of_products(observers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        activation_scale, _ = observers[0].calculate_qparams()
        weight_scale, _ = observers[1].calculate_qparams()
        scale = activation_scale * weight_scale
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    return DerivedQuantizationSpec(
        derived_from=[(activation, node), (weight, node)],
        derive_qparams_fn=scale_of_products,
        dtype=torch.int32,
        quant_min=-INT32_MAX,
        quant_max=INT32_MAX,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
    )


def kind_of(node: Node) -> str:
    """The operator of `node` as torch names it."""
    return str(node.target).split(".")[1]


def _set(node: Node, inputs: dict[Any, Any], output: Any) -> None:
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, _annotated=True)


def _is_grouped_transposed(node: Node) -> bool:
    return node.target in TRANSPOSED and node.args[GROUPS : GROUPS + 1] not in ((), (1,))


def _tensors(node: Node) -> list[Any]:
    """The activations that `node` reads."""
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return list(parts)
    return list(node.args[:1] if node.target in WEIGHTED | UNARY else node.args[:2])


def _tables(model: GraphModule, node: Node) -> list[Node]:
    """Learnt rows that `node` looks up, adds to other values or multiplies them by, such as a text's positions."""
    if node.target is aten.embedding.default:
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    if node.target not in ELEMENTWISE:
        return []
    operands = [operand for operand in node.args[:2] if isinstance(operand, Node) and operand.op == "get_attr"]
    return [operand for operand in operands if _is_table(held(model, operand))]


def _is_table(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) and value.dim() == 2 and value.numel() >= SMALLEST_TABLE


def only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def is_float_tensor(value: Any) -> bool:
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(fake, torch.Tensor) and fake.is_floating_point()


def _is_broadcast(operand: Any, node: Node) -> bool:
    """Whether `operand` is stretched to the shape of `node`'s output, and so far smaller than it."""
    return len(operand.meta["val"].shape) < len(node.meta["val"].shape) or any(
        isinstance(small, int) and small == 1 and not (isinstance(size, int) and size == 1)
        for small, size in zip(operand.meta["val"].shape[1:], node.meta["val"].shape[1:], strict=False)
    )


def _is_quantised(node: Any) -> bool:
    """Whether the values that `node` gives are quantised."""
    if not isinstance(node, Node):
        return False
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation.output_qspec is not None

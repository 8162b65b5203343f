"""Placement: which tensors of a graph are quantised, so that the target's runtime computes in integers.

ONNX Runtime fuses `dequantise → operator → quantise` into one integer operator only if all of its inputs and outputs
are quantised, and only for some operators. This quantizer annotates just those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from optpipe.target import InstructionSet, Target

aten = torch.ops.aten
INT32_MAX = 2**31 - 1
EPS = 2.0**-24  # smallest scale: torchao's default, 2^-12, is coarse for weights near zero

# weight and bias are arguments 1 and 2
WEIGHTED = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
ELEMENTWISE = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor}
POOLING = {aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default}
# the output holds the input's values, so it has the input's scale
MOVING = {
    aten.max_pool2d.default, aten.flatten.using_ints, aten.view.default, aten.reshape.default, aten.permute.default,
    aten.transpose.int, aten.squeeze.dim, aten.unsqueeze.default,
}  # fmt: skip
# the range of a quantised output can stand for these
CLAMPING = {aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default}


@dataclass(frozen=True)
class Scheme:
    """Types and ranges of quantised tensors."""

    name: str  # "u8s8"
    reason: str
    activation: torch.dtype
    weight_bits: int  # 7 where pairs of products would saturate int16
    observer: str = "histogram"

    @cached_property
    def activation_spec(self) -> QuantizationSpec:
        low, high = (0, 255) if self.activation is torch.uint8 else (-128, 127)
        observer = HistogramObserver if self.observer == "histogram" else MinMaxObserver
        return QuantizationSpec(
            dtype=self.activation,
            observer_or_fake_quant_ctr=observer.with_args(eps=EPS),
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_tensor_affine,
        )

    @cached_property
    def weight_spec(self) -> QuantizationSpec:
        limit = 2 ** (self.weight_bits - 1) - 1
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=EPS),
            quant_min=-limit,
            quant_max=limit,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )


def scheme(target: Target, signedness: str, observer: str) -> Scheme:
    """The types to use on `target`; signedness "auto" takes what its instruction set multiplies fastest.

    x86 multiplies unsigned by signed bytes; without a dot-product instruction it adds pairs of products in int16,
    which saturates unless weights keep to 7 bits (ONNX Runtime's documentation calls this reduce_range). Signed by
    signed is for Arm: on x86 ONNX Runtime leaves a signed convolution with relu in float.
    """
    instructions = target.int8_instructions()
    signed = instructions in (InstructionSet.neon, InstructionSet.neon_dotprod)
    name = signedness if signedness != "auto" else "s8s8" if signed else "u8s8"
    reduce_range = name == "u8s8" and instructions is InstructionSet.avx2
    reason = f"{'chosen for' if signedness == 'auto' else 'asked for; the target has'} {instructions.value}"
    if reduce_range:
        reason += ", weights in 7 bits because it has no int8 dot product"
    dtype = torch.int8 if name == "s8s8" else torch.uint8
    return Scheme(name, reason, dtype, 7 if reduce_range else 8, observer)


class OnnxRuntimeQuantizer(Quantizer):  # type: ignore[misc]
    """Annotates a PT2E graph for ONNX Runtime's integer operators.

    num_compute: operators with weights, and matrix products, that were annotated.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.num_compute = 0

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in WEIGHTED:
                self._weighted(node)
            elif node.target in PRODUCTS:
                self._operator(node, node.args[:2])
                self.num_compute += 1
            elif node.target in ELEMENTWISE and all(_is_float_tensor(arg) for arg in node.args[:2]):
                self._operator(node, node.args[:2])
            elif node.target in POOLING:
                self._operator(node, node.args[:1])
        for node in model.graph.nodes:
            if node.op == "call_function" and node.target in MOVING and _is_quantised(node.args[0]):
                self._moving(node)
        return model

    def validate(self, model: GraphModule) -> None:
        """Every annotation follows from the graph; nothing can be inconsistent."""

    def _weighted(self, node: Node) -> None:
        activation, weight = node.args[0], node.args[1]
        if not isinstance(activation, Node) or not isinstance(weight, Node) or weight.op != "get_attr":
            return
        bias = node.args[2] if len(node.args) > 2 else None
        inputs: dict[Any, Any] = {activation: self.scheme.activation_spec, weight: self.scheme.weight_spec}
        if isinstance(bias, Node):
            inputs[bias] = _bias_spec(node, activation, weight)
        self._annotate(node, inputs)
        self.num_compute += 1

    def _operator(self, node: Node, tensors: Any) -> None:
        self._annotate(node, {tensor: self.scheme.activation_spec for tensor in tensors})

    def _annotate(self, node: Node, inputs: dict[Any, Any]) -> None:
        """Quantise the inputs and the output; a relu that alone reads the output is fused into the operator.

        What the graph returns stays float: the engine multiplies in integers and writes the result unrounded.
        """
        last = node
        if (relu := _only_user(node)) is not None and relu.target in CLAMPING:
            last = relu
        output = None if any(user.op == "output" for user in last.users) else self.scheme.activation_spec
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=output if last is node else None, _annotated=True
        )
        if last is not node:
            last.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(output_qspec=output, _annotated=True)

    def _moving(self, node: Node) -> None:
        source = node.args[0]
        output = SharedQuantizationSpec((source, node))
        if any(user.op == "output" for user in node.users):
            return
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map={source: self.scheme.activation_spec}, output_qspec=output, _annotated=True
        )


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
        if bias is None or bias.op != "call_module":
            continue
        activation_observer = _attribute(prepared, activation.target)
        weight_observer = _attribute(prepared, weight.target)
        activation_scale, _ = activation_observer.calculate_qparams()
        values = _attribute(prepared, bias.args[0].target).detach()
        limit = values.abs() / (INT32_MAX / 2) / activation_scale * weight_observer.quant_max
        low, high = weight_observer.min_val, weight_observer.max_val
        widened += int((limit > torch.maximum(high, -low)).sum())
        high.copy_(torch.maximum(high, limit))
        low.copy_(torch.minimum(low, -limit))
    return widened


def _attribute(module: Any, path: Any) -> Any:
    """The submodule or tensor at a dotted path."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _bias_spec(node: Node, activation: Node, weight: Node) -> DerivedQuantizationSpec:
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
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_float_tensor(value: Any) -> bool:
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(fake, torch.Tensor) and fake.is_floating_point()


def _is_quantised(node: Any) -> bool:
    """Whether the values that `node` gives are quantised."""
    if not isinstance(node, Node):
        return False
    annotation = node.meta.get(Q_ANNOTATION_KEY)
    return annotation is not None and annotation.output_qspec is not None

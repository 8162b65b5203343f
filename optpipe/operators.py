"""Operators of optpipe's own: what a runtime can compute and PyTorch cannot say.

Each is a torch operator whose eager kernel computes what the runtime will, a fake kernel that lets torch.export trace
it, and a function that writes it as ONNX. Whatever loads a module or program that calls them must import this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "optpipe"
STORED = "Stored"  # an ONNX operator that no optimiser knows; `restore` takes it out again


@torch.library.custom_op("optpipe::stored", mutates_args=())
def stored(values: Tensor) -> Tensor:
    """`values` as they are, and as they shall be in the file: no exporter computes ahead what follows from them."""
    return values.clone()


@stored.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


@torch.library.custom_op("optpipe::dynamic_quantized_linear", mutates_args=())
def dynamic_quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, in) · weight (in, out), int8 + bias (out), where x is rounded to uint8 by its own range, zero included.

    scale: of the columns of `weight`, (out).
    """
    low, high = torch.aminmax(x)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    zero = torch.round(-low / step)
    rounded = torch.clamp(torch.round(x / step) + zero, 0, 255) - zero
    product = rounded @ weight.to(x.dtype) * (step * scale)
    return product if bias is None else product + bias


@dynamic_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


@torch.library.custom_op("optpipe::packed_quantized_linear", mutates_args=())
def packed_quantized_linear(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x (…, in) · weight + bias (out), with the weight unpacked anew in each call and x rounded to int8 group by group.

    packed: (out, groups, group_size · bits / 8), uint8, as `packed` gives it; scales: (out, groups).
    """
    weight = unpacked(packed, bits) * scales.unsqueeze(2)
    groups = F.pad(x, (0, -x.shape[-1] % group_size)).reshape(*x.shape[:-1], -1, group_size)
    step = groups.abs().amax(-1, keepdim=True) / 127
    rounded = torch.round(groups / torch.where(step == 0, 1, step)) * step
    return F.linear(rounded.flatten(-2), weight.flatten(1), bias)


@packed_quantized_linear.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def packed(values: Tensor, bits: int) -> Tensor:
    """Signed integers of 4 or 8 bits, (…, n), as unsigned bytes around a zero point in the middle, two nibbles in one.

    The lower nibble comes first: the layout of ONNX Runtime's MatMulNBits.
    """
    unsigned = (values.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[..., ::2] + 16 * unsigned[..., 1::2]
    return unsigned


def unpacked(values: Tensor, bits: int) -> Tensor:
    """What `packed` was given, as float32."""
    unsigned = values.to(torch.float32)
    if bits == 4:  # in arithmetic: the exporter writes a shift of bytes as one of signed bytes
        high = torch.floor(unsigned / 16)
        unsigned = torch.stack([unsigned - 16 * high, high], dim=-1).flatten(-2)
    return unsigned - (1 << bits - 1)


# What follows is written in torch operators: a graph may call it, and torch.export sees into it.


def unpacked_half(values: Tensor) -> Tensor:
    """Values that are stored in half precision, as float32."""
    widened: Tensor = stored(values).to(torch.float32)
    return widened


def unpacked_weight(packed: Tensor, scales: Tensor, bits: int, group_size: int, shape: Sequence[int]) -> Tensor:
    """A weight of `shape` from packed (out, groups, bytes) and scales (out, groups, 1), less the zeros at its end."""
    weight = unpacked(stored(packed), bits)[..., :group_size] * scales
    columns = math.prod(shape[1:])
    return weight.flatten(1)[:, :columns].reshape(shape)


def quantized_embedding(rows: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    """Rows of int8 (n, width) times their scales (n, 1), at `indices`."""
    return F.embedding(indices, rows).to(torch.float32) * F.embedding(indices, scales)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table of torch.onnx.export that writes these operators as ONNX."""
    import onnxscript

    op = onnxscript.opset20
    write_stored = _foreign(DOMAIN, STORED, inputs=1)
    matmul_nbits = _foreign("com.microsoft", "MatMulNBits", 3, "K", "N", "bits", "block_size", "accuracy_level")

    def write_dynamic(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
        """The chain that ONNX Runtime fuses into DynamicQuantizeMatMul; where several read x, into the parts of it."""
        rounded, step, zero = op.DynamicQuantizeLinear(x)
        product = op.Cast(op.MatMulInteger(rounded, weight, zero), to=onnxscript.FLOAT.dtype)
        product = op.Mul(product, op.Mul(step, scale))
        return product if bias is None else op.Add(product, bias)

    def write_packed(x: Any, packed: Any, scales: Any, bias: Any, bits: int, group_size: int) -> Any:
        # accuracy level 4 multiplies in int8: with 8 bits 1.6 to 50 times as fast as level 0, which unpacks to float
        product = matmul_nbits(
            x, packed, scales, K=x.shape[-1], N=packed.shape[0], bits=bits, block_size=group_size, accuracy_level=4
        )
        return product if bias is None else op.Add(product, bias)

    operators = torch.ops.optpipe
    return {
        operators.stored.default: write_stored,
        operators.dynamic_quantized_linear.default: write_dynamic,
        operators.packed_quantized_linear.default: write_packed,
    }


def _foreign(domain: str, name: str, inputs: int, *attributes: str) -> Any:
    """An operator that ONNX itself does not define; its attributes are integers."""
    import onnxscript
    from onnx.defs import OpSchema

    types = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "int8", "uint8", "int64")]
    schema = OpSchema(
        name,
        domain,
        since_version=1,
        inputs=[OpSchema.FormalParameter(f"x{i}", f"T{i}") for i in range(inputs)],
        outputs=[OpSchema.FormalParameter("y", "T0")],
        type_constraints=[(f"T{i}", types, "") for i in range(inputs)],
        attributes=[OpSchema.Attribute(attribute, OpSchema.AttrType.INT) for attribute in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(domain, 1), name, schema)


def restore(model: onnx_ir.Model) -> None:
    """Take the operators that only held the exporter's optimiser off stored values out of `model`."""
    import onnx_ir as ir

    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == STORED:
            values = node.inputs[0]
            assert values is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], values)
            model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)

"""Quantize, weight-only: weights in 8 or 4 bits, activations in float.

Takes and gives a torch module; the one it gives is a graph that reads packed weights. Needs no calibration data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Node

    from .weights import Rewriter, Weight

WIDEST_BLOCK = 256  # that ONNX Runtime's MatMulNBits has kernels for


class Unpack(Enum):
    """When the packed weights of linear layers become numbers to multiply by; others always do when a session loads."""

    at_call = "at_call"  # in every call: they stay packed in memory, and inputs are rounded to int8 (MatMulNBits)
    at_load = "at_load"  # once, when a session loads: the speed, memory and inputs of float, in a smaller file


@register("quantize/weight_only", takes="torch", gives="torch")
@dataclass(kw_only=True)
class WeightOnly:
    """Weights symmetric, in 8 or 4 bits, with a scale per output channel or group of inputs (Dettmers & Zettlemoyer
    2023, §2.2); below 8 bits the scale is that of the least squared error (Nagel et al. 2021, §3.1). Of a transposed
    convolution the channels are those of its input.
    """

    bits: int = 8
    group_size: int = 0  # inputs that share a scale: 0 for all of a channel, or 16, 32, 64, 128, 256
    unpack: Unpack = Unpack.at_call
    embeddings: bool = True  # store embeddings too, in int8
    keep: list[str] = field(default_factory=list)  # layer name patterns that stay float

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}; it must be 8 or 4")
        if self.group_size not in (0, 16, 32, 64, 128, 256):
            raise ValueError(
                f"group_size is {self.group_size}; it must be 0 (a whole channel), 16, 32, 64, 128 or 256, the blocks "
                "that ONNX Runtime has kernels for"
            )

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from . import weights as w

        graph = w.capture(model, ctx.task)
        found = [weight for weight in w.weights(graph) if weight.values.dim() > 1]
        kept = w.kept(found, self.keep)
        rewriter = w.Rewriter(graph)
        at_call, at_load, tables = [], [], []
        for weight in found:
            for reader in [] if weight.path in kept else weight.readers:
                if w.is_embedding(weight, reader) or w.is_table(weight, reader):
                    if not self.embeddings:
                        continue
                    tables.append(weight.layer)
                    if w.is_embedding(weight, reader):
                        rewriter.gather_integers(weight, reader)
                    else:
                        rewriter.unpack_at_load(weight, reader, 8, 0)
                elif w.is_linear(weight, reader) and self.unpack is Unpack.at_call:
                    self._pack(rewriter, weight, reader)
                    at_call.append(weight.layer)
                else:
                    rewriter.unpack_at_load(weight, reader, self.bits, self.group_size)
                    at_load.append(weight.layer)
        if not at_call and not at_load:
            raise StageError(f"this model has no weight of {w.SMALLEST} values or more to store in {self.bits} bits")
        quantised = {*at_call, *at_load, *tables}
        left = [weight.layer for weight in found if weight.layer not in quantised]
        ctx.record(unpacked_at_call=at_call, unpacked_at_load=at_load, int8_tables=tables, float_layers=left)
        ctx.note(
            f"weights of {len(at_call) + len(at_load)} layers in {self.bits} bits: {len(at_call)} stay packed in "
            f"memory, {len(at_load)} become float when a session loads, at the speed and memory of float; "
            f"{len(tables)} embeddings in int8; float: {w.said(left)}"
        )
        return rewriter.finish()

    def _pack(self, rewriter: Rewriter, weight: Weight, reader: Node) -> None:
        """Put the operator that unpacks its weight in the place of the linear one."""
        import torch

        from optpipe.operators import packed

        from .weights import grouped, rounded

        size = self.group_size
        if size:
            integers, scales = rounded(grouped(weight.values, size), self.bits)
        else:  # a block may not be wider, so that the blocks of a wide channel repeat its scale
            size = min(WIDEST_BLOCK, max(16, 2 ** math.ceil(math.log2(weight.values.shape[1]))))
            whole, scale = rounded(weight.values, self.bits)
            integers = grouped(whole, size)
            scales = scale[:, None].expand(-1, integers.shape[1], -1)
        x, _, *bias = reader.args
        bytes_ = rewriter.put(weight, f"int{self.bits}_blocks", packed(integers, self.bits))
        scale_node = rewriter.scale(weight, "block_scale", scales.squeeze(2))
        operator = torch.ops.optpipe.packed_quantized_linear.default
        arguments = (x, bytes_, scale_node, *(bias or [None]), self.bits, size)
        rewriter.replace(reader, rewriter.call(reader, operator, *arguments))

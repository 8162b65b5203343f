"""Quantize, dynamic: linear layers in int8, with the ranges of their inputs found anew in every call.

Takes and gives a torch module; the one it gives is a graph with integer operators. Needs no calibration data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Node

    from .weights import Rewriter, Weight


@register("quantize/dynamic", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Dynamic:
    """Weights symmetric per output channel, activations affine per tensor at run time (Jacob et al. 2018, §2; ONNX's
    DynamicQuantizeLinear). A call's range is that of its whole batch.
    """

    embeddings: bool = True  # store embeddings, and matrices that are added as positions are, in int8 too
    keep: list[str] = field(default_factory=list)  # layer name patterns that stay float

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from . import weights as w

        graph = w.capture(model, ctx.task)
        found = w.weights(graph, smallest=1)
        kept = w.kept(found, self.keep)
        rewriter, bits = w.Rewriter(graph), ctx.target.weight_bits
        linear, stored, left = [], [], []
        for weight in found:
            for reader in [] if weight.path in kept else weight.readers:
                if w.is_linear(weight, reader):
                    _quantise(rewriter, weight, reader, bits)
                    linear.append(weight.layer)
                elif self.embeddings and w.is_embedding(weight, reader):
                    rewriter.gather_integers(weight, reader)
                    stored.append(weight.layer)
                elif self.embeddings and w.is_table(weight, reader) and weight.values.numel() >= w.SMALLEST:
                    rewriter.unpack_at_load(weight, reader, 8, 0)
                    stored.append(weight.layer)
                elif weight.is_matrix:
                    left.append(weight.layer)
        left += [weight.layer for weight in found if weight.path in kept and weight.is_matrix]
        if not linear:
            raise StageError(
                f"this model has no linear layer to quantise dynamically (left: {w.said(left)}); "
                "use quantize=static for convolutions, or quantize=weight_only for a smaller file"
            )
        ctx.record(int8_layers=len(linear), int8_tables=len(stored), float_layers=left, weight_bits=bits)
        ctx.note(
            f"{len(linear)} linear layers multiply in int8, {len(stored)} embeddings are stored in it; "
            f"float: {w.said(left)}"
        )
        return rewriter.finish()


def _quantise(rewriter: Rewriter, weight: Weight, reader: Node, bits: int) -> None:
    """Put the integer operator in the place of the linear one."""
    import torch

    from .weights import rounded

    integers, scales = rounded(weight.values, 8, limit=2 ** (bits - 1) - 1)
    x, _, *bias = reader.args
    columns = rewriter.put(weight, "int8_columns", integers.t())  # in × out, as the engine multiplies
    scale = rewriter.scale(weight, "column_scale", scales.flatten())
    operator = torch.ops.optpipe.dynamic_quantized_linear.default
    rewriter.replace(reader, rewriter.call(reader, operator, x, columns, scale, *bias))

"""Quantize, half: weights in 16-bit floating point, and on a GPU the computation too.

Takes and gives a torch module; the one it gives is a graph whose inputs and outputs stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from optpipe.context import Context
from optpipe.errors import StageError, reason
from optpipe.registry import register

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.fx import GraphModule

    from .weights import Weight

SMALLEST = 64  # values of a tensor below which the operator that widens it would take as many bytes as are saved


class Dtype(Enum):
    """The stored type."""

    fp16 = "fp16"  # 11 bits of precision, up to 65504
    bf16 = "bf16"  # 8 bits of precision, the range of float32


class Compute(Enum):
    """What the operators compute in."""

    auto = "auto"  # half on cuda, float on a processor, where ONNX Runtime has next to no 16-bit kernels
    half = "half"
    float = "float"  # weights become float32 once, when a session loads: half the file, the same speed


@register("quantize/half", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Half:
    """IEEE 754 binary16 (Micikevicius et al. 2018) or bfloat16 (Kalamkar et al. 2019)."""

    dtype: Dtype = Dtype.fp16
    compute: Compute = Compute.auto

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import torch

        from . import weights as w

        dtype = {Dtype.fp16: torch.float16, Dtype.bf16: torch.bfloat16}[self.dtype]
        computes_half = self.compute is Compute.half or (self.compute is Compute.auto and ctx.target.device != "cpu")
        graph = w.capture(model, ctx.task)
        found = w.weights(graph, smallest=1 if computes_half else SMALLEST, buffers=computes_half)
        if not found:
            raise StageError(
                f"this model has no float32 tensor of {SMALLEST} values or more to store in half precision"
            )
        _refuse_overflow(found, dtype)
        if computes_half:
            halved = _compute_in(graph, found, dtype)
            ctx.note(f"{len(found)} tensors and all operators in {self.dtype.value}; inputs and outputs stay float32")
            if ctx.target.device == "cpu" and ctx.target.runtime == "onnxruntime":
                ctx.note(_try_in_onnxruntime(halved, ctx, self.dtype))
        else:
            halved = _store_in(graph, found, dtype)
            ctx.note(
                f"{len(found)} tensors stored in {self.dtype.value}; they become float32 when a session loads, so that "
                "nothing gets faster"
            )
        ctx.record(tensors=len(found), dtype=self.dtype.value, computes="half" if computes_half else "float")
        return halved


def _refuse_overflow(found: list[Weight], dtype: torch.dtype) -> None:
    import torch

    limit = torch.finfo(dtype).max
    for weight in found:
        largest = float(weight.values.abs().max())
        if largest > limit and weight.is_parameter:  # a mask of -1e9 may become -inf
            raise StageError(
                f"'{weight.path}' holds {largest:.6g}, more than the {limit:.6g} that {str(dtype)[6:]} holds; "
                "use quantize.dtype=bf16"
            )


def _store_in(graph: GraphModule, found: list[Weight], dtype: torch.dtype) -> GraphModule:
    """Store the tensors in `dtype`; all operators stay as they are."""
    from optpipe.operators import unpacked_half

    from .weights import Rewriter

    rewriter = Rewriter(graph)
    for weight in found:
        stored = rewriter.put(weight, "half", weight.values.to(dtype))
        widened = rewriter.call(weight.node, unpacked_half, stored)
        for reader in weight.readers:
            reader.replace_input_with(weight.node, widened)
    return rewriter.finish()


def _compute_in(graph: GraphModule, found: list[Weight], dtype: torch.dtype) -> GraphModule:
    """Everything in `dtype` between the inputs and the outputs, what the model's own code calls float32 included."""
    import torch
    from torch.fx import map_arg
    from torch.fx.node import map_aggregate

    from .weights import Rewriter, aten

    rewriter = Rewriter(graph)

    def halved(argument: Any) -> Any:
        return dtype if argument is torch.float32 else argument

    for node in list(graph.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
        elif node.op == "call_function":
            node.args, node.kwargs = map_aggregate(node.args, halved), map_aggregate(node.kwargs, halved)
    for weight in found:
        stored = rewriter.put(weight, "half", weight.values.to(dtype))
        for reader in weight.readers:
            reader.replace_input_with(weight.node, stored)
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dtype is torch.float32:
            with graph.graph.inserting_after(node):
                narrow = graph.graph.call_function(aten.to.dtype, (node, dtype))
            node.replace_all_uses_with(narrow, delete_user_cb=lambda user, narrow=narrow: user is not narrow)
        if node.op == "output":

            def widened(result: Any, output: Any = node) -> Any:
                value = result.meta.get("val")
                if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32:
                    return result
                with graph.graph.inserting_before(output):
                    return graph.graph.call_function(aten.to.dtype, (result, torch.float32))

            node.args = map_arg(node.args, widened)
    return rewriter.finish()


def _try_in_onnxruntime(halved: GraphModule, ctx: Context, dtype: Dtype) -> str:
    """What ONNX Runtime does with it on this machine. Raises StageError if it cannot run it."""
    import onnx
    import onnxruntime as ort

    from optpipe.lower import to_onnx, trace
    from optpipe.runtimes.onnxruntime import session_options

    tried, optimised = ctx.dir / "tried.onnx", ctx.dir / "tried_optimised.onnx"
    program = trace(halved, ctx.task)
    options = session_options(ctx.target.threads)
    options.optimized_model_filepath = str(optimised)
    try:
        to_onnx(program, tried)  # refuses what ONNX has no such type for
        ort.InferenceSession(str(tried), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise StageError(
            f"ONNX Runtime {ort.__version__} cannot compute this model in {dtype.value} on a processor: "
            f"{_without_codes(error)}. Use quantize.compute=float: weights are stored in {dtype.value}, the rest is "
            "float32"
        ) from error
    finally:
        tried.unlink(missing_ok=True)
    nodes = onnx.load(optimised).graph.node
    optimised.unlink()
    casts = sum(node.op_type == "Cast" for node in nodes)
    return (
        f"ONNX Runtime {ort.__version__} executes {len(nodes)} operators, {casts} of them conversions: what it has no "
        f"{dtype.value} kernel for on a processor, it computes in float32"
    )


def _without_codes(error: Exception) -> str:
    """Why, without the runtime's codes."""
    return reason(error).rpartition(" : ")[2][:200].rstrip(".")

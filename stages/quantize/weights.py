"""Weights of a captured graph: who reads them, and smaller ones to put in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from optpipe import operators
from optpipe.errors import StageError
from optpipe.patterns import matching

if TYPE_CHECKING:
    from optpipe.task import Task

aten = torch.ops.aten
SMALLEST = 256  # values of a tensor below which what unpacks it would take as many bytes as are saved
SHRINK = torch.linspace(0.7, 1.0, 13)  # of a range, to find the one whose rounding errs least
HALF_RANGE = 2.0**-20, 2.0**15  # scales that float16 holds to within a few per cent


@dataclass(frozen=True)
class Weight:
    """A float tensor of the model and the operators that read it."""

    path: str  # "blocks.0.up.weight"
    values: Tensor
    node: Node
    readers: list[Node] = field(default_factory=list)
    is_parameter: bool = True

    @property
    def is_matrix(self) -> bool:
        return self.values.dim() > 1

    @property
    def layer(self) -> str:
        """The module that holds it, or its own name where that is the model."""
        return self.path.rpartition(".")[0] or self.path


def capture(model: nn.Module, task: Task) -> GraphModule:
    """`model` as a graph of torch operators that read weights by name."""
    from optpipe.lower import trace

    graph = model if isinstance(model, GraphModule) else trace(model, task).module(check_guards=False)
    assert isinstance(graph, GraphModule)
    return graph


def weights(graph: GraphModule, smallest: int = SMALLEST, *, buffers: bool = False) -> list[Weight]:
    """Every float32 parameter of at least `smallest` values that an operator reads.

    buffers: whether other tensors that the model holds, such as a mask with -inf, are among them.
    Raises StageError for a parameter that holds NaN or infinity.
    """
    found: dict[str, Weight] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        values = attrgetter(node.target)(graph)
        kinds = Tensor if buffers else nn.Parameter
        if not isinstance(values, kinds) or values.dtype is not torch.float32 or values.numel() < smallest:
            continue
        if isinstance(values, nn.Parameter) and not torch.isfinite(values).all():
            raise StageError(f"'{node.target}' holds NaN or infinity; train or load these weights again")
        weight = found.setdefault(
            node.target, Weight(node.target, values.detach(), node, is_parameter=isinstance(values, nn.Parameter))
        )
        weight.readers.extend(reader for reader in node.users if reader not in weight.readers)
        if node is not weight.node:  # read a second time
            node.replace_all_uses_with(weight.node)
    return list(found.values())


def is_linear(weight: Weight, reader: Node) -> bool:
    return reader.target is aten.linear.default and _is_argument(weight, reader, 1)


def is_embedding(weight: Weight, reader: Node) -> bool:
    return reader.target is aten.embedding.default and _is_argument(weight, reader, 0)


def is_table(weight: Weight, reader: Node) -> bool:
    """Whether `reader` adds a matrix of weights to its input, as positions are."""
    return reader.target in (aten.add.Tensor, aten.add_.Tensor) and weight.is_matrix


def kept(found: Sequence[Weight], patterns: Sequence[str]) -> set[str]:
    """The paths of the weights whose layers `patterns` name; StageError for a pattern that names none."""
    layers = matching(sorted({weight.layer for weight in found}), patterns, "keep", "layer")
    return {weight.path for weight in found if weight.layer in layers}


def rounded(values: Tensor, bits: int, limit: int = 0) -> tuple[Tensor, Tensor]:
    """Symmetric integers of `values` (…, n), int8, and their scales (…, 1).

    Below 8 bits, scales are those of the least squared error. They are float16 wherever that holds them: float32 ones
    would be a good part of a file of integers.
    limit: the largest integer, if it is to be less than `bits` could hold.
    """
    high = limit or 2 ** (bits - 1) - 1
    low = -high if bits == 8 else -high - 1
    most = values.abs().amax(-1, keepdim=True) / high
    most = torch.where(most == 0, torch.ones_like(most), most)
    half = bool(((most > HALF_RANGE[0]) & (most < HALF_RANGE[1])).all())
    best, least = most, torch.full_like(most, torch.inf)
    for shrink in SHRINK.tolist() if bits < 8 else [1.0]:
        trial = (most * shrink).half().float() if half else most * shrink
        error = (torch.clamp(torch.round(values / trial), low, high) * trial - values).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, trial, best), torch.minimum(error, least)
    integers = torch.clamp(torch.round(values / best), low, high).to(torch.int8)
    return integers, best.half() if half else best


def said(layers: Sequence[str]) -> str:
    """Layers for a note: the first few by name."""
    names = list(dict.fromkeys(layers))
    return ", ".join([*names[:4], f"{len(names) - 4} more"] if len(names) > 4 else names) or "none"


def grouped(values: Tensor, group_size: int) -> Tensor:
    """`values` (out, …) as (out, groups, group_size), the last group filled up with zeros; 0 is one group."""
    flat = values.flatten(1)
    size = group_size or flat.shape[1]
    return nn.functional.pad(flat, (0, -flat.shape[1] % size)).reshape(len(flat), -1, size)


class Rewriter:
    """Puts other weights into a graph; `finish` leaves in it only what is still read."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph

    def put(self, weight: Weight, suffix: str, values: Tensor) -> Node:
        """A new tensor beside `weight`, to be read from before the first operator on."""
        owner, _, leaf = weight.path.rpartition(".")
        module = attrgetter(owner)(self.graph) if owner else self.graph
        name = f"{leaf}_{suffix}"
        if not hasattr(module, name):
            module.register_buffer(name, values.contiguous())
        with self.graph.graph.inserting_before(weight.node):
            return self.graph.graph.get_attr(f"{owner}.{name}" if owner else name)

    def call(self, before: Node, function: Callable[..., Any], *args: Any) -> Node:
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_function(function, args)

    def scale(self, weight: Weight, suffix: str, values: Tensor) -> Node:
        """Scales as float32 in the graph, whatever they are in the file."""
        node = self.put(weight, suffix, values)
        return node if values.dtype is torch.float32 else self.call(weight.node, operators.unpacked_half, node)

    def replace(self, reader: Node, new: Node) -> None:
        reader.replace_all_uses_with(new)
        self.graph.graph.erase_node(reader)

    def unpack_at_load(self, weight: Weight, reader: Node, bits: int, group_size: int) -> None:
        """Store `weight` in integers that become float once, when a session loads; rows of it are channels."""
        integers, scales = rounded(grouped(weight.values, group_size), bits)
        if integers.shape[-1] % 2 and bits == 4:
            integers = nn.functional.pad(integers, (0, 1))
        packed = self.put(weight, f"int{bits}", operators.packed(integers, bits))
        scale = self.scale(weight, "scale", scales)
        size = group_size or weight.values[0].numel()
        new = self.call(weight.node, operators.unpacked_weight, packed, scale, bits, size, list(weight.values.shape))
        reader.replace_input_with(weight.node, new)

    def gather_integers(self, weight: Weight, reader: Node) -> None:
        """Store an embedding in int8; only the rows that a call reads become float."""
        integers, scales = rounded(weight.values, 8)
        rows = self.put(weight, "int8", integers)
        scale = self.scale(weight, "row_scale", scales)
        self.replace(reader, self.call(reader, operators.quantized_embedding, rows, scale, reader.args[1]))

    def finish(self) -> GraphModule:
        graph = self.graph
        graph.graph.eliminate_dead_code()
        read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
        for path in [
            *dict(graph.named_parameters(remove_duplicate=False)),
            *dict(graph.named_buffers(remove_duplicate=False)),
        ]:
            if path not in read:
                owner, _, leaf = path.rpartition(".")
                delattr(attrgetter(owner)(graph) if owner else graph, leaf)
        graph.graph.lint()
        graph.recompile()
        return graph


def _is_argument(weight: Weight, reader: Node, position: int) -> bool:
    argument = reader.args[position] if len(reader.args) > position else None
    return isinstance(argument, Node) and argument.op == "get_attr" and argument.target == weight.path

"""torchao's patterns of batch norm and dropout, exported once and no earlier than they are needed.

Preparing and converting a graph for training, torchao exports about 140 small patterns with torch.export, for every
kind of convolution, rounding and bias whether the graph has one or not, and six more whenever the graph is switched
between training and not: all that takes longer than training a small network. The patterns depend on nothing but what
their functions close over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import qat_utils, utils

Export = Callable[..., GraphModule]

_exported: dict[Any, GraphModule] = {}


@contextmanager
def patterns_once() -> Iterator[None]:
    """Within this torchao keeps its patterns, and exports those alone that its graph may hold or that replace one."""
    wraps = {
        (qat_utils, "_fuse_conv_bn_qat_helper"): _where_present,
        (qat_utils, "_fold_conv_bn_qat_helper"): _where_present,
        (qat_utils, "_get_aten_graph_module_for_pattern"): _put_off,
        (qat_utils, "replace_pattern_with_filters"): _replacing,
        (utils, "_get_aten_graph_module_for_pattern"): _kept,
    }
    own = {place: getattr(*place) for place in wraps}
    for (module, name), wrap in wraps.items():
        setattr(module, name, wrap(own[module, name]))
    try:
        yield
    finally:
        for (module, name), function in own.items():
            setattr(module, name, function)


@dataclass(frozen=True)
class Pattern:
    """A pattern that is exported when somebody needs its graph."""

    export: Export
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # of `export`, behind the pattern
    settings: dict[str, Any]

    @property
    def graph(self) -> GraphModule:
        return self.export(self.function, *self.arguments, **self.settings)

    def may_be_in(self, graph: GraphModule) -> bool:
        """False if no convolution of `graph` is followed by a batch norm in training and rounded as in this pattern."""
        of = _closed_over(self.function)
        if not {"conv_fn", "is_per_channel", "has_bias", "bias_is_quantized"} <= of.keys():
            return True
        if not any(node.target is torch.ops.aten.sqrt.default for node in graph.graph.nodes):
            return False  # of the running variance: replaced already, or never there
        asked = of["is_per_channel"], of["has_bias"], of["bias_is_quantized"]
        return asked in {_rounding(node) for node in _convolutions(graph, of["conv_fn"])}


def _where_present(helper: Export) -> Export:
    def only_there(graph: GraphModule, kind: Any, *args: Any, **kwargs: Any) -> GraphModule:
        return helper(graph, kind, *args, **kwargs) if _convolutions(graph, kind) else graph

    return only_there


def _put_off(export: Export) -> Callable[..., Pattern]:
    def later(function: Any, *arguments: Any, **settings: Any) -> Pattern:
        return Pattern(_kept(export), function, arguments, settings)

    return later


def _replacing(replace: Callable[..., Any]) -> Callable[..., Any]:
    def where_it_may_be(graph: GraphModule, match: Pattern, replacement: Pattern, **settings: Any) -> Any:
        if not match.may_be_in(graph):
            return []
        return replace(graph, match.graph, replacement_callback=lambda *_: replacement.graph.graph, **settings)

    return where_it_may_be


def _kept(export: Export) -> Export:
    def known_or_exported(function: Any, example: Any, is_cuda: bool = False, **settings: Any) -> GraphModule:
        name, of = function.fn.__qualname__, tuple(_closed_over(function).values())
        key = name, of, is_cuda, tuple(settings)
        if key not in _exported:
            _exported[key] = export(function, example, is_cuda, **settings)
        return _exported[key]

    return known_or_exported


def _closed_over(function: Any) -> dict[str, Any]:
    """What a pattern's function closes over, by name."""
    names, cells = function.fn.__code__.co_freevars, function.fn.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _convolutions(graph: GraphModule, kind: Any) -> list[Node]:
    """Calls of torch.nn.functional's `kind`."""
    operator = getattr(torch.ops.aten, kind.__name__)
    return [node for node in graph.graph.nodes if getattr(node.target, "overloadpacket", None) is operator]


def _rounding(convolution: Node) -> tuple[bool, bool, bool]:
    """Whether its weights are rounded per channel, it has a bias, and that is rounded."""
    _, weight, bias = (*convolution.args, None)[:3]
    return "per_channel" in _operator(weight), bias is not None, "dequantize" in _operator(bias)


def _operator(value: Any) -> str:
    return str(value.target) if isinstance(value, Node) else ""

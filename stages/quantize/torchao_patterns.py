"""torchao's patterns of batch norm and dropout, exported once.

Preparing and converting a graph for training, torchao exports about 140 small patterns with torch.export, for every
kind of convolution whether the graph has one or not, and six more whenever the graph is switched between training and
not: all that takes longer than training a small network. The patterns depend on nothing but what their functions close
over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e import qat_utils, utils

_exported: dict[Any, GraphModule] = {}
_HELPERS = ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper")
_EXPORT = "_get_aten_graph_module_for_pattern"


@contextmanager
def patterns_once() -> Iterator[None]:
    """Within this torchao keeps its patterns, and tries none of a kind of convolution that a graph lacks."""
    own = [(qat_utils, name, getattr(qat_utils, name)) for name in (*_HELPERS, _EXPORT)]
    own.append((utils, _EXPORT, getattr(utils, _EXPORT)))
    for module, name, function in own:
        setattr(module, name, (_kept if name == _EXPORT else _where_present)(function))
    try:
        yield
    finally:
        for module, name, function in own:
            setattr(module, name, function)


def _where_present(helper: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    def only_there(graph: GraphModule, kind: Any, *args: Any, **kwargs: Any) -> GraphModule:
        operator = getattr(torch.ops.aten, kind.__name__)  # as the pattern of this kind holds it
        present = any(getattr(node.target, "overloadpacket", None) is operator for node in graph.graph.nodes)
        return helper(graph, kind, *args, **kwargs) if present else graph

    return only_there


def _kept(export: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    def known_or_exported(pattern: Any, example: Any, is_cuda: bool = False, **kwargs: Any) -> GraphModule:
        closed_over = tuple(cell.cell_contents for cell in pattern.fn.__closure__ or ())
        key = pattern.fn.__qualname__, closed_over, is_cuda, tuple(kwargs)
        if key not in _exported:
            _exported[key] = export(pattern, example, is_cuda, **kwargs)
        return _exported[key]

    return known_or_exported

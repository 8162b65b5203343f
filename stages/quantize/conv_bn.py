"""torchao's patterns of a convolution with batch norm, exported once.

Preparing and converting a graph for training, torchao exports about 140 small patterns with torch.export, anew in every
call and for every kind of convolution whether the graph has one or not: ten times what all else takes. The patterns
depend on nothing but what their functions close over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e import qat_utils

_exported: dict[Any, GraphModule] = {}
_HELPERS = ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper")
_EXPORT = "_get_aten_graph_module_for_pattern"


@contextmanager
def patterns_once() -> Iterator[None]:
    """Within this torchao keeps its patterns, and tries none of a kind of convolution that a graph lacks."""
    own = {name: getattr(qat_utils, name) for name in (*_HELPERS, _EXPORT)}
    for name in _HELPERS:
        setattr(qat_utils, name, _where_present(own[name]))
    setattr(qat_utils, _EXPORT, _kept(own[_EXPORT]))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(qat_utils, name, function)


def _where_present(helper: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    def only_there(graph: GraphModule, kind: Any, *args: Any, **kwargs: Any) -> GraphModule:
        operator = getattr(torch.ops.aten, kind.__name__)  # as the pattern of this kind holds it
        present = any(getattr(node.target, "overloadpacket", None) is operator for node in graph.graph.nodes)
        return helper(graph, kind, *args, **kwargs) if present else graph

    return only_there


def _kept(export: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    def known_or_exported(pattern: Any, example: Any, is_cuda: bool = False, **kwargs: Any) -> GraphModule:
        closed_over = tuple(cell.cell_contents for cell in pattern.fn.__closure__)
        key = pattern.fn.__qualname__, closed_over, is_cuda, tuple(kwargs)
        if key not in _exported:
            _exported[key] = export(pattern, example, is_cuda, **kwargs)
        return _exported[key]

    return known_or_exported

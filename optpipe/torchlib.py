"""torch's table of operators in ONNX, built once for each opset.

torch.onnx.export builds it anew on every call, by parsing the source of 500 functions: 1.4 of the 1.7 s that a small
model takes on a 2.5 GHz Xeon. A run exports a preview for every step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch.onnx._internal.exporter._registration import ONNXRegistry

_build = ONNXRegistry.from_torchlib


@functools.cache
def _built(opset: int) -> ONNXRegistry:
    return _build(opset_version=opset)


def _copied(opset_version: int) -> ONNXRegistry:
    """A table of the caller's own, to which it adds custom operators."""
    whole = _built(opset_version)
    table = ONNXRegistry()
    table._opset_version = whole.opset_version
    table.functions = {name: list(ways) for name, ways in whole.functions.items()}
    return table


@contextlib.contextmanager
def built_once() -> Iterator[None]:
    """Exports inside share the table."""
    ONNXRegistry.from_torchlib = staticmethod(_copied)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = _build  # type: ignore[method-assign]

"""Parity: does a model still compute the same after its form has changed?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from optpipe.errors import StageError
from optpipe.forms.exported import ExportedFile
from optpipe.task import Inputs, Task, batch_of, call, tensors_in

BATCH_SIZES = (1, 2, 5)

# Largest difference of an output, as a share of the largest output. An int8 engine rounds where the fake-quantised
# model does not, and each rounding moves a value by up to one step, 1/255 of its range. In half precision every
# operator rounds to 8 or 11 bits, and engines differ in which they compute in float32 instead.
TOLERANCE = {"float32": 1e-3, "half": 0.03, "int8": 0.1}


@dataclass(frozen=True)
class Parity:
    """How far two models were apart on real samples."""

    max_error: float  # largest difference of an output, as a share of the largest output
    label_flips: int  # samples whose largest output changed place
    n: int  # samples compared

    def note(self) -> str:
        return (
            f"parity: largest difference {self.max_error:.2g} of the range, {self.label_flips} of {self.n} labels flip"
        )


def check(
    before: Callable[..., Any],
    after: Callable[..., Any],
    task: Task,
    *,
    precision: str,
    locate: Callable[[Inputs, float], str] | None = None,
) -> Parity:
    """Compare two models on a batch of one, a few more, and a whole batch of validation samples.

    precision: what they compute in, a key of TOLERANCE.
    locate: names the first layer that differs on some inputs by more than a tolerance, if it can.
    Raises StageError if an output is further off than that allows, or has another shape.
    """
    inputs, _ = next(iter(task.validation))
    batches = [batch_of(inputs, size) for size in BATCH_SIZES] + [inputs]
    worst, flips, count = 0.0, 0, 0
    for batch in batches:
        with torch.no_grad():
            expected, found = (tensors_in(task.selected(call(model, batch))) for model in (before, after))
        if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
            raise StageError(
                f"the outputs had shapes {[tuple(t.shape) for t in expected]} before this step "
                f"and {[tuple(t.shape) for t in found]} after it"
            )
        worst = max(worst, *(difference(a, b) for a, b in zip(expected, found, strict=True)))
        flips, count = _flips(expected[0], found[0]), len(expected[0])  # of the last, largest batch
    if worst > TOLERANCE[precision]:
        layer = locate(inputs, TOLERANCE[precision]) if locate else ""
        where = f"; '{layer}' is the first layer that is seen to differ" if layer else ""
        raise StageError(
            f"the outputs changed by {worst:.2g} of their range, more than the {TOLERANCE[precision]:g} that "
            f"{precision} allows; {flips} of {count} labels flip{where}"
        )
    return Parity(worst, flips, count)


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; infinite where one is no number, 1 where labels differ."""
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return float((expected != found).any())
    apart = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-6)
    return float(apart) if torch.isfinite(apart) else float("inf")


def _flips(expected: torch.Tensor, found: torch.Tensor) -> int:
    if expected.dim() < 2 or expected.shape[-1] < 2:
        return 0
    return int((expected.argmax(dim=-1) != found.argmax(dim=-1)).sum())


def _onnx_precision(model: ExportedFile) -> str:
    import onnx

    graph = onnx.load(model.path, load_external_data=False).graph
    if any("Quantize" in node.op_type or "Integer" in node.op_type for node in graph.node):
        return "int8"
    half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return "half" if any(tensor.data_type in half for tensor in graph.initializer) else "float32"


def coarsest(*precisions: str) -> str:
    """The one with the widest tolerance."""
    return max(precisions, key=TOLERANCE.__getitem__)


def precision(model: Any) -> str:
    """What a model computes in, a key of TOLERANCE: as far as the operators of a module, program or ONNX file tell."""
    if isinstance(model, ExportedFile) and model.format == "onnx":
        return _onnx_precision(model)
    graph = getattr(model, "graph", None)
    targets = [str(node.target) for node in getattr(graph, "nodes", ())]
    if any("quantize" in target for target in targets):
        return "int8"
    tensors = getattr(model, "state_dict", {})
    held = {tensor.dtype for tensor in (tensors() if callable(tensors) else tensors).values()}
    if held & {torch.float16, torch.bfloat16} and not any("optpipe.stored" in target for target in targets):
        return "half"
    return "float32"

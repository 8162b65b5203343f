"""Does a captured graph compute what the model does, on inputs that take the other branch too?

A graph holds the branches that its example inputs took. Where a model goes another way on other inputs, the graph is
another function, and no error says so: so both are run on real samples, and on what is made of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from optpipe.errors import StageError, named_reason
from optpipe.parity import TOLERANCE, difference
from optpipe.reasons import line_of
from optpipe.task import Inputs, Task, batch_of, call, map_tensors, size_of, tensors_in

SAMPLES = 8  # of each kind; the frame's parity check takes more of the real ones
ALWAYS = ("a batch of 1", "a batch of 3", "real samples")  # that every model must take
Model = Callable[..., Any]


def compare(
    model: Model,
    captured: Model,
    task: Task,
    *,
    precision: str,
    cuts: Mapping[str, Callable[[Inputs], Inputs]] | None = None,
) -> int:
    """Run both on real samples and on those made of them; return how many kinds of inputs agreed.

    precision: what they compute in, a key of TOLERANCE.
    cuts: other sizes that the model must take too, in words, and what makes them of samples.
    Inputs on which `model` itself fails, or does not give finite numbers, are left out.
    Raises StageError that says on which inputs the outputs differ, and by how much.
    """
    agreed = 0
    for kind, inputs in _inputs(task, cuts or {}):
        try:
            expected = _outputs(model, inputs, task)
        except Exception as error:  # the model's own limits, unless every size or real sample must be taken
            if kind in ALWAYS or kind in (cuts or {}):
                line = line_of(error, model) if isinstance(model, nn.Module) else None
                where = f", at {line}" if line else ""
                raise StageError(f"the model itself does not run on {kind}: {named_reason(error)}{where}") from error
            continue
        if not all(bool(torch.isfinite(tensor).all()) for tensor in expected if tensor.is_floating_point()):
            continue
        try:
            found = _outputs(captured, inputs, task)
        except Exception as error:
            raise StageError(
                f"the graph does not run on {kind}, which the model takes: {named_reason(error)}"
            ) from error
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, found)]
        if shapes[0] != shapes[1]:
            raise StageError(
                f"the capture baked in a branch or a size: on {kind} outputs have shapes {shapes[1]}, not {shapes[0]}"
            )
        worst = max(difference(a, b) for a, b in zip(expected, found, strict=True))
        if worst > TOLERANCE[precision]:
            if _disagrees_with_itself(model, inputs, expected, task, precision):
                raise StageError(
                    "the model gives other outputs each time, from Python's random or a clock, and a graph cannot"
                )
            raise StageError(f"the capture baked in a branch: on {kind} outputs differ by {worst:.2g} of their range")
        agreed += 1
    return agreed


def _inputs(task: Task, cuts: Mapping[str, Callable[[Inputs], Inputs]]) -> Iterator[tuple[str, Inputs]]:
    """Kinds of inputs with their names: real batches of several sizes, and what takes other branches."""
    batches = [inputs for inputs, _ in islice(task.validation, 2)]
    first = batches[0]
    for size in (1, 3):
        yield f"a batch of {size}", batch_of(first, size)
    for batch in batches:
        yield "real samples", batch_of(batch, min(size_of(batch), SAMPLES))
    for kind, cut in cuts.items():
        yield kind, cut(batch_of(first, 3))
    inputs = batch_of(first, min(size_of(first), SAMPLES))
    tensors = tensors_in(inputs)
    generator = torch.Generator().manual_seed(0)
    if any(tensor.is_floating_point() for tensor in tensors):
        for kind, change in CHANGES.items():
            yield f"real samples {kind}", map_tensors(partial(_only, change, torch.is_floating_point), inputs)
    for tensor in tensors:
        order = torch.randperm(tensor.numel(), generator=generator)
        yield "real samples with their values shuffled", map_tensors(partial(_shuffled, tensor, order), inputs)
    if any(map(_is_integer, tensors)):
        for kind, change in EXTREMES.items():
            yield f"the {kind} integers", map_tensors(partial(_only, change, _is_integer), inputs)


def _shuffled(which: Tensor, order: Tensor, tensor: Tensor) -> Tensor:
    return tensor.flatten()[order].view_as(tensor) if tensor is which else tensor


def _only(change: Callable[[Tensor], Tensor], where: Callable[[Tensor], bool], tensor: Tensor) -> Tensor:
    return change(tensor) if where(tensor) else tensor


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype is not torch.bool


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lambda tensor: -tensor,
    "set to zero": torch.zeros_like,
    "times 10": lambda tensor: tensor * 10,
    "times 0.1": lambda tensor: tensor * 0.1,
}
EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {
    "smallest": lambda tensor: tensor.amin().expand_as(tensor).clone(),
    "largest": lambda tensor: tensor.amax().expand_as(tensor).clone(),
}


def _outputs(model: Model, inputs: Inputs, task: Task) -> list[Tensor]:
    """What `model` returns on a copy of `inputs`, with the same random numbers for each model."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors_in(copy.deepcopy(task.selected(call(model, map_tensors(torch.clone, inputs)))))


def _disagrees_with_itself(model: Model, inputs: Inputs, expected: list[Tensor], task: Task, precision: str) -> bool:
    again = _outputs(model, inputs, task)
    return any(difference(a, b) > TOLERANCE[precision] for a, b in zip(expected, again, strict=True))

"""Trace: capture a module as one graph that runs without the user's Python.

Takes a torch module, gives an exported program or a TorchScript module. Every way that is tried is recorded; what it
captured is compared with the model on real samples, and on inputs made of them that take other branches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram
    from torch.jit import ScriptModule

    from optpipe.capture import Free
    from optpipe.task import Inputs

T = TypeVar("T")


@register("trace/program", takes="torch", gives="program")
@dataclass(kw_only=True)
class Program:
    """torch.export, strict, which reads the code, then not strict, which runs it; with a batch size that stays free."""

    dynamic: dict[str, list[int]] = field(default_factory=dict)  # input: dimensions that stay free beside the batch
    min_size: int = 2  # of those dimensions
    max_size: int = 4096
    keep_eager: bool = False  # go on with the module itself where nothing captures it; it can then not be exported

    def __post_init__(self) -> None:
        if not 1 <= self.min_size < self.max_size:
            raise ValueError(f"min_size is {self.min_size} and max_size {self.max_size}; give 1 ≤ min_size < max_size")
        for name, dimensions in self.dynamic.items():
            if any(dimension < 1 for dimension in dimensions):
                raise ValueError(
                    f"dynamic names dimensions {list(dimensions)} of '{name}'; count from 1: dimension 0 is the batch, "
                    "which is always free"
                )

    def gives(self) -> tuple[str, ...]:
        """The forms that may come out."""
        return ("program", "torch") if self.keep_eager else ("program",)

    def run(self, model: nn.Module, ctx: Context) -> ExportedProgram | nn.Module:
        from torch import fx

        from optpipe.capture import Free, capture

        free = Free(self.dynamic, self.min_size, self.max_size)
        ways = {
            f"torch.export, {said}": partial(capture, model, ctx.task, strict=strict, free=free)
            for said, strict in (("strict", True), ("not strict", False))
            if not (strict and isinstance(model, fx.GraphModule))  # which holds no Python to read
        }
        try:
            program = _first_that_works(ways, lambda found: _same_program(found, model, ctx, free), ctx)
        except StageError as error:
            if not self.keep_eager:
                raise
            ctx.note(f"NOT CAPTURED: the model goes on as eager Python, since keep_eager is true; {error}")
            return model.eval()
        _describe(program, model, ctx)
        return program


@register("trace/torchscript", takes="torch", gives="torchscript")
@dataclass(kw_only=True)
class TorchScript:
    """torch.jit: what the model does on an example, then what its code says, then the former with dicts and lists."""

    def run(self, model: nn.Module, ctx: Context) -> ScriptModule:
        from optpipe.capture import script, trace

        ways = {
            "torch.jit.trace": partial(trace, model, ctx.task, strict=True),
            "torch.jit.script": partial(script, model),
            "torch.jit.trace, strict=False": partial(trace, model, ctx.task, strict=False),
        }
        return _first_that_works(ways, lambda found: _compare(model, found, ctx), ctx)


def _first_that_works(ways: Mapping[str, Callable[[], T]], prove: Callable[[T], None], ctx: Context) -> T:
    """What the first of `ways` captures that passes `prove`. Raises StageError with the reasons of all."""
    reasons: dict[str, list[str]] = {}
    for way, capture in ways.items():
        begin = time.perf_counter()
        try:
            found = capture()
            prove(found)
        except StageError as error:
            ctx.attempt(way, ok=False, seconds=time.perf_counter() - begin, reason=str(error))
            reasons.setdefault(str(error), []).append(way)
            continue
        ctx.attempt(way, ok=True, seconds=time.perf_counter() - begin)
        return found
    told = sorted(reasons, key=lambda reason: ", `" not in reason)  # those that name a line of the source first
    raise StageError(
        "\n  - ".join(["this model cannot be captured:", *(f"{' and '.join(reasons[r])}: {r}" for r in told)])
    )


def _same_program(program: ExportedProgram, model: nn.Module, ctx: Context, free: Free) -> None:
    """Raise StageError if `program` is not the same function as `model`, or `model` changes what it is given."""
    from torch import fx

    from optpipe.capture import changed_inputs, shortened

    if isinstance(model, fx.GraphModule):  # a graph has no other branch
        return
    for name, line in changed_inputs(program, model).items():
        raise StageError(f"the model writes into its input '{name}'{line}; write x = x + 1 instead of x += 1")
    halved = " and ".join(f"dimension {d} of '{name}'" for name, found in free.dimensions.items() for d in found)
    cuts = {f"samples with {halved}, which is to stay free, halved": partial(shortened, model, free=free)}
    _compare(model, program.module(), ctx, cuts if halved else None)


def _compare(
    model: nn.Module,
    captured: Callable[..., object],
    ctx: Context,
    cuts: Mapping[str, Callable[[Inputs], Inputs]] | None = None,
) -> None:
    """Raise StageError where the two differ, naming the lines of the model that make Python values of tensors."""
    from optpipe import branches, parity
    from optpipe.reasons import values_read

    model.eval()
    try:
        agreed = branches.compare(model, captured, ctx.task, precision=parity.precision(model), cuts=cuts)
    except StageError as error:
        lines = [f"{reader} at {line}" for reader, line in values_read(model, ctx.task.example_inputs)]
        raise StageError(
            f"{error}; it reads values of tensors by {', '.join(lines)}" if lines else str(error)
        ) from error
    ctx.record(kinds_of_inputs_compared=agreed)


def _describe(program: ExportedProgram, model: nn.Module, ctx: Context) -> None:
    """Tell how large the graph is and what of its shapes is free."""
    from optpipe.capture import MAX_BATCH, sizes

    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    ctx.record(operators=operators)
    ctx.note(f"captured {operators} operators; batch size free from 1 to {MAX_BATCH}")
    for place, (least, most) in sizes(program, model, ctx.task.example_inputs).items():
        ctx.note(f"{place} free from {least} to {most}")

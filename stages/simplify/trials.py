"""Trials: every rewrite is proven on real samples, and undone alone if it changes the outputs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optpipe.errors import StageError, named_reason
from optpipe.parity import BATCH_SIZES
from optpipe.report.schema import Table
from optpipe.task import Inputs, Task, batch_of, call, leaves, size_of

from .flow import Flow

MOST = 32  # samples in a batch


@dataclass(frozen=True)
class Rewrite:
    """Something that `change` can do to the modules named in `where`, and how to undo what is no module's own."""

    pattern: str
    where: tuple[str, ...]
    change: Callable[[], None]
    undo: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Opportunity:
    """A row of the report's table."""

    pattern: str
    where: tuple[str, ...]
    status: str  # applied | refused | left to the runtime
    reason: str = ""


def opportunities_table(found: Sequence[Opportunity]) -> Table:
    return Table(
        title="Fusion opportunities",
        columns=["pattern", "where", "status", "reason"],
        rows=[[entry.pattern, ", ".join(entry.where), entry.status, entry.reason] for entry in found],
        note="A name with () is a function that `forward` calls. Applied: the model was rewritten, and its outputs on "
        "real samples stayed. Left to the runtime: nothing was changed here.",
    )


@dataclass
class Trials:
    """Makes rewrites of `model`, whose outputs must stay within `tolerance` of what they were on `batches`."""

    model: nn.Module
    batches: list[Inputs]
    expected: list[Any]
    tolerance: float
    refused: dict[tuple[str, tuple[str, ...]], Opportunity] = field(default_factory=dict)

    _flow: Flow | None = None

    def flow(self) -> Flow:
        """What reads what now, seen on the small batches."""
        if self._flow is None:
            self._flow = Flow.of(self.model, self.small)
        return self._flow

    @property
    def small(self) -> list[Inputs]:
        """Those of `batches` that take little time."""
        return [inputs for inputs in self.batches if size_of(inputs) <= max(BATCH_SIZES)] or self.batches[:1]

    def make(self, rewrites: Sequence[Rewrite]) -> list[Rewrite]:
        """Make all of them at once if that holds, else one by one; return those that were made."""
        rewrites = [rewrite for rewrite in rewrites if (rewrite.pattern, rewrite.where) not in self.refused]
        if len(rewrites) > 1 and not self._attempt(rewrites):
            return list(rewrites)
        made = []
        for rewrite in rewrites:
            if reason := self._attempt([rewrite]):
                self.refuse(rewrite.pattern, rewrite.where, reason)
            else:
                made.append(rewrite)
        return made

    def refuse(self, pattern: str, where: Sequence[str], reason: str) -> None:
        self.refused[pattern, tuple(where)] = Opportunity(pattern, tuple(where), "refused", reason)

    def difference(self) -> float:
        """The largest difference of an output as a share of the largest value there; StageError for another type."""
        return max(
            _difference(before, returned(self.model, inputs))
            for before, inputs in zip(self.expected, self.batches, strict=True)
        )

    def _attempt(self, rewrites: Sequence[Rewrite]) -> str:
        """Make them; undo them and return the reason if that cannot be done, or the outputs change."""
        before, self._flow = _Structure(self.model), None
        try:
            for rewrite in rewrites:
                rewrite.change()
            worst = self.difference()
            reason = f"outputs changed by {worst:.2g} of their range, more than tolerance={self.tolerance:g}"
            if worst <= self.tolerance:
                return ""
        except Exception as error:  # whatever the user's own forward raises when its modules are others
            reason = named_reason(error)
        for rewrite in reversed(rewrites):
            rewrite.undo()
        before.restore()
        return reason


def samples_of(task: Task) -> list[Inputs]:
    """Inputs that a rewrite must hold on: the example's; one, a few and more of validation; as many of calibration."""
    batches = [task.example_inputs]
    for split, sizes in ((task.validation, (*BATCH_SIZES, MOST)), (task.calibration, (MOST,))):
        for inputs, _ in itertools.islice(split, 1):
            batches += [batch_of(inputs, min(size, size_of(inputs))) for size in sizes]
    return batches


def returned(model: nn.Module, inputs: Inputs) -> Any:
    """What `model` returns for `inputs`; what it draws is drawn again the next time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call(model, inputs)


def _difference(expected: Any, found: Any) -> float:
    before, after = dict(leaves(expected)), dict(leaves(found))
    if list(before) != list(after):
        raise StageError(f"the model returned {', '.join(before)} and now returns {', '.join(after)}")
    worst = 0.0
    for way, value in before.items():
        other = after[way]
        if not isinstance(value, Tensor):
            if type(value) is not type(other) or (isinstance(value, (int, str, float)) and value != other):
                raise StageError(f"output '{way}' was {value!r} and is now {other!r}")
        elif value.shape != other.shape or value.dtype != other.dtype:
            raise StageError(f"output '{way}' was {_described(value)} and is now {_described(other)}")
        elif value.numel():
            worst = max(worst, _distance(value, other))
    return worst


def _distance(value: Tensor, other: Tensor) -> float:
    """What is infinite or no number must stay so."""
    kind = torch.complex128 if value.is_complex() else torch.float64
    value, other = value.to(kind), other.to(kind)
    apart = torch.where((value == other) | (value.isnan() & other.isnan()), 0.0, (value - other).abs())
    scale = value[value.isfinite()].abs().max().clamp(min=1e-6) if value.isfinite().any() else torch.tensor(1.0)
    return float(torch.nan_to_num(apart, nan=torch.inf).max() / scale)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class _Structure:
    """Classes and attributes of a model's modules; tensors are not copied, since no rewrite writes into one."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(module, module.__class__, _shallow(module.__dict__)) for module in model.modules()]

    def restore(self) -> None:
        for module, kind, state in self._kept:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(_shallow(state))


def _shallow(state: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, (dict, set)) else value for name, value in state.items()}

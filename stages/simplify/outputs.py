"""Outputs: a model that returns only the tensors that matter.

The model becomes an object of a subclass of its own class whose `forward` selects. Names of modules and of arguments
stay as they are, and with them the patterns of later stages.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, fx, jit, nn

from optpipe.errors import StageError
from optpipe.report.schema import Table
from optpipe.task import leaves, named_tensors, parts_of, select

Step = tuple[str, Any]  # ("item", key) of a dict or sequence, ("field", name) of a dataclass


class Selected:
    """Stands before the model's own class; `_ways`: name → steps to the tensor, or None to keep every tensor."""

    _ways: dict[str, list[Step]] | None

    def __reduce_ex__(self, protocol: Any) -> Any:  # the subclass is made where it is needed, and cannot be imported
        return _empty, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        returned = "tensors only" if self._ways is None else ", ".join(self._ways)
        return ", ".join(filter(None, [own, f"returns: {returned}"]))


def places_of(samples: list[Any], names: list[str]) -> list[str]:
    """The ways to the tensors called `names` in what a model returned for each of several inputs.

    Raises StageError for a name that stands for no tensor or several, or elsewhere for other inputs.
    """
    found = [[way for way, _ in select(value, names)] for value in samples]
    if other := next((ways for ways in found if ways != found[0]), None):
        raise StageError(f"the outputs {names} are {found[0]} for some inputs and {other} for others; name whole ways")
    return found[0]


def is_plain(value: Any, places: list[str]) -> bool:
    """Whether `value` is a tensor, or holds the tensors at `places`, in that order, and nothing else."""
    if isinstance(value, Tensor):
        return True
    flat = isinstance(value, (Mapping, tuple, list)) and all(isinstance(part, Tensor) for _, part in parts_of(value))  # type: ignore[union-attr]
    return flat and [way for way, _ in leaves(value)] == places


def select_outputs(model: nn.Module, sample: Any, names: list[str], places: list[str]) -> None:
    """Make `model` return the tensors at `places` of a value like `sample`: one alone, several in a dict by `names`."""
    steps = {way: steps for way, steps in _steps(sample)}
    _become(model, {name: steps[way] for name, way in zip(names, places, strict=True)})


def selected(value: Any, names: list[str]) -> Any:
    """What a model returns instead of `value` after `select_outputs`."""
    found = [tensor for _, tensor in select(value, names)]
    return found[0] if len(found) == 1 else dict(zip(names, found, strict=True))


def keep_tensors(model: nn.Module) -> None:
    """Make `model` return what it does without what is no tensor."""
    _become(model, None)


def why_not_tensors(samples: list[Any]) -> str:
    """Why what is no tensor cannot be taken out of what a model returns; empty if it can."""
    if any(map(_is_record, _containers(samples[0]))):
        return "it is in a dataclass or named tuple"
    ways = [ways_to_tensors(value) for value in samples]
    if not ways[0]:
        return "nothing else is returned"
    if other := next((way for way in ways if way != ways[0]), None):
        return f"{len(ways[0])} tensors are returned for some inputs and {len(other)} for others"
    return ""


def ways_to_tensors(value: Any) -> list[str]:
    return [way for way, _ in named_tensors(value)]


def dropped_table(sample: Any, places: list[str]) -> Table:
    """What is in `sample` but not at `places`, entries of a list that look alike in one row."""
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for way, leaf in leaves(sample):
        if way not in places:
            kind = f"tensor {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            rows[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", way), kind].append(way)
    return Table(
        title="Dropped outputs",
        columns=["output", "type", "count"],
        rows=[[like if len(ways) > 1 else ways[0], kind, len(ways)] for (like, kind), ways in rows.items()],
        note="For the task's example inputs. * stands for the places in a list.",
    )


def _become(model: nn.Module, ways: dict[str, list[Step]] | None) -> None:
    if isinstance(model, (fx.GraphModule, jit.ScriptModule)):
        raise StageError(
            f"a {type(model).__name__} is a graph already, whose outputs cannot be selected; give the module behind it"
        )
    model.__dict__["_ways"] = ways
    model.__class__ = _class(type(model))  # type: ignore[arg-type]


@functools.cache
def _class(original: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(original.forward)  # names of arguments become those of a graph's inputs
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = original.forward(self, *args, **kwargs)
        if self._ways is None:
            return tensors_only(value)
        found = {name: _at(value, steps) for name, steps in self._ways.items()}
        return next(iter(found.values())) if len(found) == 1 else found

    made: type[nn.Module] = type(f"Selected{original.__name__}", (Selected, original), {"forward": forward})
    return made


def _empty(original: type[nn.Module]) -> nn.Module:
    made = _class(original)  # type: ignore[arg-type]
    return made.__new__(made)


def _at(value: Any, steps: Sequence[Step]) -> Any:
    for kind, name in steps:
        value = getattr(value, name) if kind == "field" else value[name]
    return value


def tensors_only(value: Any) -> Any:
    """`value` without the parts that hold no tensor."""
    if isinstance(value, Mapping):
        kept = {name: tensors_only(part) for name, part in value.items() if _holds_tensor(part)}
        return type(value)(**kept) if is_dataclass(value) else kept  # as the ModelOutput of transformers is
    if isinstance(value, (tuple, list)):
        return type(value)([tensors_only(part) for part in value if _holds_tensor(part)])
    return value


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _steps(value: Any, way: str = "", steps: tuple[Step, ...] = ()) -> Iterator[tuple[str, list[Step]]]:
    """The way to every leaf of `value`, as optpipe.task.leaves names it, and the steps along it."""
    parts: list[tuple[Step, Any]] = []
    if isinstance(value, Mapping):
        parts = [(("item", name), part) for name, part in value.items()]
    elif isinstance(value, (tuple, list)):
        parts = [(("item", place), part) for place, part in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(("field", field.name), getattr(value, field.name)) for field in fields(value)]
    else:
        yield way, list(steps)
    for step, part in parts:
        yield from _steps(part, f"{way}.{step[1]}" if way else str(step[1]), (*steps, step))


def _is_record(value: Any) -> bool:
    """Whether fields of `value` cannot be left out."""
    return hasattr(value, "_fields") or (is_dataclass(value) and not isinstance(value, Mapping))


def _containers(value: Any) -> Iterator[Any]:
    parts = parts_of(value)
    if parts is not None:
        yield value
        for _, part in parts:
            yield from _containers(part)

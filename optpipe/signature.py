"""What a deployed model takes: how its manifest says so, the check before every call, and the words where it fails."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optpipe.errors import OptpipeError, did_you_mean

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.task import Task


@dataclass(frozen=True)
class Input:
    """One input. What is None was not recorded and is not checked."""

    name: str
    dtype: np.dtype[Any] | None = None
    shape: tuple[int | str | None, ...] | None = None  # a size, the name of one that is free, None for any
    keyword: bool = False  # the engine takes it by name only

    @classmethod
    def read(cls, entry: str | Mapping[str, Any]) -> Input:
        """From the manifest."""
        if isinstance(entry, str):
            return cls(entry)
        dtype, shape = entry.get("dtype"), entry.get("shape")
        return cls(
            entry["name"],
            np.dtype(dtype) if dtype else None,
            tuple(shape) if shape is not None else None,
            entry.get("keyword", False),
        )

    def words(self) -> str:
        """As in `image: float32 (batch, 1, 32, 32)`."""
        parts = [str(self.dtype)] * (self.dtype is not None) + [_shape(self.shape)] * (self.shape is not None)
        return f"{self.name}: {' '.join(parts)}" if parts else self.name


class Signature:
    """The inputs of a model, in order."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.inputs = inputs
        self._right: list[tuple[np.dtype[Any] | None, tuple[int, ...]]] = [(None, ())] * len(inputs)  # those last seen

    def checked(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> Sequence[np.ndarray[Any, Any]]:
        """The inputs in order, as arrays that every engine takes. Raises OptpipeError for the first that is wrong.

        Nothing is cast. An array that is not contiguous, not aligned or read-only is copied.
        """
        if named or len(arrays) != len(self.inputs):
            arrays = self._in_order(arrays, named)
        for array, (dtype, shape) in zip(arrays, self._right):  # noqa: B905  `strict` costs as much as a comparison
            if (
                type(array) is not np.ndarray
                or array.dtype is not dtype
                or array.shape != shape
                or not array.flags.carray
            ):
                self._examine(arrays)
                return [each if each.flags.carray else each.copy(order="C") for each in arrays]
        return arrays

    def _in_order(self, arrays: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """Those given by position, then those given by name, each where it belongs."""
        names = [each.name for each in self.inputs]
        if len(arrays) > len(names):
            raise OptpipeError(f"{len(arrays)} inputs were given, and the model takes {self._words()}")
        for name in named:
            if name not in names:
                raise OptpipeError(
                    f"the model has no input '{name}'{did_you_mean(name, names)}; it takes {self._words()}"
                )
            if name in names[: len(arrays)]:
                raise OptpipeError(f"input '{name}' was given twice, by position and by name; give it once")
        if missing := [name for name in names[len(arrays) :] if name not in named]:
            raise OptpipeError(f"input '{missing[0]}' is missing; the model takes {self._words()}")
        return [*arrays, *(named[name] for name in names[len(arrays) :])]

    def _words(self) -> str:
        count = "1 input" if len(self.inputs) == 1 else f"{len(self.inputs)} inputs"
        return f"{count} ({', '.join(each.words() for each in self.inputs)})"

    def _examine(self, arrays: Sequence[Any]) -> None:
        """Raise for the first input that is wrong; else remember types and shapes: the next are often the same."""
        sizes: dict[str, tuple[int, str]] = {}  # of free dimensions, and the input that fixed each
        for array, expected in zip(arrays, self.inputs, strict=True):
            _examine_type(array, expected)
            for i, (size, wanted) in enumerate(zip(array.shape, expected.shape or (), strict=False)):
                if size == wanted or wanted is None:
                    continue
                if isinstance(wanted, int):
                    raise _wrong_shape(array, expected, f"dimension {i} is {size} and must be {wanted}")
                before, owner = sizes.setdefault(wanted, (size, expected.name))
                if size != before:
                    raise _wrong_shape(array, expected, f"{wanted} is {size} here and {before} in '{owner}'")
        self._right = [(array.dtype, array.shape) for array in arrays]


def of_program(program: ExportedProgram, task: Task) -> list[dict[str, Any]]:
    """The inputs of a captured graph, for the manifest: it knows its fixed sizes."""
    names = program.graph_signature.user_inputs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    values = [node.meta["val"] for node in nodes]
    first = next((str(value.shape[0]) for value in values if value.dim() and not isinstance(value.shape[0], int)), None)
    _, keywords = program.call_spec.in_spec.children() if program.call_spec.in_spec else (None, None)
    by_name = list(keywords.context) if keywords else []
    by_position = len(nodes) - len(by_name)
    given = task.input_names or []
    positions = given if len(given) == by_position else [node.name for node in nodes[:by_position]]

    def size(value: Any) -> int | str:
        return value if isinstance(value, int) else "batch" if str(value) == first else str(value)

    return [
        _entry(name, value.dtype, [size(each) for each in value.shape], i >= by_position)
        for i, (name, value) in enumerate(zip([*positions, *by_name], values, strict=True))
    ]


def of_module(model: Any, task: Task) -> list[dict[str, Any]]:
    """The inputs of a module or file, like the task's example; of sizes, only their number is sure."""
    import torch
    from torch import nn

    from optpipe.task import arguments

    args, kwargs = arguments(task.example_inputs)
    is_python = isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule)
    own = list(inspect.signature(model.forward).parameters) if is_python else []
    names = [task.input_names or [], own[: len(args)]]
    fitting = (each for each in names if len(each) == len(args))
    positions = next(fitting, [f"input_{i}" for i in range(len(args))])
    tensors = {**dict(zip(positions, args, strict=True)), **kwargs}
    return [
        _entry(name, tensor.dtype, ["batch", *[None] * (tensor.dim() - 1)] if tensor.dim() else [], name in kwargs)
        for name, tensor in tensors.items()
    ]


def _entry(name: str, dtype: Any, shape: list[Any], keyword: bool) -> dict[str, Any]:
    entry = {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": shape}
    return {**entry, "keyword": True} if keyword else entry


def _examine_type(array: Any, expected: Input) -> None:
    """Raise if `array` is none, hides elements, or has another dtype or number of dimensions than `expected`."""
    name, dtype = expected.name, expected.dtype
    if isinstance(array, np.ma.MaskedArray):
        raise OptpipeError(f"input '{name}' is a masked array, whose mask the model cannot see; pass array.filled(…)")
    if not isinstance(array, np.ndarray):
        kind = f"{type(array).__module__}.{type(array).__name__}".removeprefix("builtins.")
        wanted = f", np.{dtype}" if dtype is not None else ""
        how = "tensor.numpy(force=True)" if kind.startswith("torch.") else f"np.asarray(value{wanted})"
        raise OptpipeError(f"input '{name}' is of type {kind}, and the model takes NumPy arrays; pass {how}")
    if dtype is not None and array.dtype != dtype:
        raise OptpipeError(
            f"input '{name}' has dtype {array.dtype}, and the model takes {expected.words()}; nothing is cast "
            f"unasked: pass array.astype(np.{dtype})"
        )
    if expected.shape is not None and array.ndim != len(expected.shape):
        add = "; for a batch of one pass array[np.newaxis]" if array.ndim == len(expected.shape) - 1 else ""
        raise OptpipeError(
            f"input '{name}' has {array.ndim} dimensions, shape {_shape(array.shape)}, and the model takes "
            f"{expected.words()}{add}"
        )


def _wrong_shape(array: Any, expected: Input, why: str) -> OptpipeError:
    return OptpipeError(
        f"input '{expected.name}' has shape {_shape(array.shape)}, and the model takes {expected.words()}: {why}"
    )


def _shape(shape: Sequence[int | str | None] | None) -> str:
    """As NumPy writes one, `any` for a size that is not recorded."""
    sizes = ["any" if size is None else str(size) for size in shape or ()]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"

"""Flow: which module reads what another one made, seen while a model runs.

A module that torch brings along counts as one step; the functions that the others' `forward` calls are steps as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from optpipe.task import Inputs, call, tensors_in

RETURNED = "the model's output"
# what says something of a tensor without reading its values
ABOUT = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_sparse", "size",
    "is_quantized", "is_nested", "is_meta", "is_mkldnn", "dim", "numel", "stride", "is_floating_point", "is_contiguous",
    "is_complex", "element_size", "get_device", "_version", "storage_offset", "names", "itemsize", "nbytes", "len",
    "data_ptr",
}  # fmt: skip


# what hands values, or a number of them that depends on values, to Python, where a branch may depend on them
LOOKS = {
    "item", "tolist", "numpy", "array", "bool", "int", "float", "index", "contains", "equal", "allclose", "is_nonzero",
    "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select",
}  # fmt: skip


@dataclass
class Pass:
    """One forward pass. A reader is a module's name, or a function's followed by ()."""

    calls: Counter[str] = field(default_factory=Counter)
    memory: set[int] = field(default_factory=set)  # storage of every tensor that a function was given
    readers: dict[tuple[str, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    gives: dict[str, int] = field(default_factory=dict)  # tensors that a module returns
    ranks: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # dimensions of what a module reads
    looks: list[str] = field(default_factory=list)  # functions that hand values of tensors to Python
    softmax: list[str] = field(default_factory=list)  # modules whose `forward` calls it


@dataclass(frozen=True)
class Flow:
    """What was seen in one pass for each of several inputs."""

    passes: list[Pass]

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Inputs]) -> Flow:
        return cls([_watched(model, inputs) for inputs in batches])

    def calls(self, module: str) -> int:
        return max(seen.calls[module] for seen in self.passes)

    def runs_once(self, *modules: str) -> bool:
        """Whether each of `modules` ran once for every input."""
        return all(seen.calls[module] == 1 for seen in self.passes for module in modules)

    def readers(self, module: str, output: int = 0) -> list[str]:
        """What reads that output of `module`, in the order of the model."""
        return list(dict.fromkeys(reader for seen in self.passes for reader in seen.readers.get((module, output), [])))

    def gives(self, module: str, output: int) -> bool:
        """Whether `module` returns that many tensors and one more."""
        return any(seen.gives.get(module, 0) > output for seen in self.passes)

    def ranks(self, module: str) -> set[int]:
        return set().union(*(seen.ranks.get(module, set()) for seen in self.passes))

    def reads(self, tensor: Tensor) -> bool:
        """Whether a function was given `tensor`, or a view of it."""
        return any(_storage(tensor) in seen.memory for seen in self.passes)

    @property
    def looks(self) -> list[str]:
        """The functions by which the model looks at values of tensors while it runs."""
        return list(dict.fromkeys(name for seen in self.passes for name in seen.looks))

    @property
    def softmax(self) -> list[str]:
        """The modules whose `forward` calls a softmax, in the order of the model."""
        return list(dict.fromkeys(module for seen in self.passes for module in seen.softmax))

    def why_not_alone(self, module: str, reader: str) -> str:
        """Why `module` and `reader`, which reads its output, cannot be made one; empty if they can."""
        if others := [other for other in self.readers(module) if other != reader]:
            return f"the output of '{module}' is read by {', '.join(map(spoken, others))} too"
        for name in (module, reader):
            if not self.runs_once(name):
                return f"'{name}' runs {self.calls(name)} times" if self.calls(name) > 1 else f"'{name}' runs at times"
        return ""


def _watched(model: nn.Module, inputs: Inputs) -> Pass:
    seen = Pass()
    made: dict[int, tuple[str, int, Tensor]] = {}  # the tensor is kept so that its id stays taken
    names = {module: name for name, module in model.named_modules()}
    inside: list[nn.Module] = []  # modules that are running
    read: list[list[tuple[Tensor, int]]] = []  # what each of them was given, and how often that had been written to

    def opaque() -> bool:
        return any(map(is_step, inside))

    def note_read(tensors: Iterable[tuple[Tensor, int]], outputs: list[Tensor], reader: str) -> None:
        same = {id(tensor) for tensor in outputs}
        for tensor, version in tensors:
            if id(tensor) in same and tensor._version == version:
                same.discard(id(tensor))  # handed on as it was
            elif id(tensor) in made:
                seen.readers[made[id(tensor)][:2]].append(reader)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if compiling():
            return
        inside.append(module)
        read.append(_versions((args, kwargs)))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if compiling():
            return
        inside.pop()
        given, name = read.pop(), names[module]
        seen.calls[name] += 1
        if opaque() or not is_step(module):
            return
        if type(module) is nn.Softmax and inside:
            seen.softmax.append(names[inside[-1]])
        outputs = tensors_in(output)
        seen.gives[name] = len(outputs)
        note_read(given, outputs, name)
        seen.ranks[name].update(tensor.dim() for tensor, _ in given)
        unchanged = {id(tensor) for tensor, version in given if tensor._version == version}
        for place, tensor in enumerate(outputs):
            if id(tensor) not in unchanged:
                made[id(tensor)] = (name, place, tensor)

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if compiling():
                return func(*args, **(kwargs or {}))
            name = _name(func)
            given = [] if name in ABOUT else _versions((args, kwargs))
            seen.memory.update(_storage(tensor) for tensor, _ in given)
            result = func(*args, **(kwargs or {}))
            if opaque() or not given:
                return result
            by_mask = name == "getitem" and any(tensor.dtype is torch.bool for tensor, _ in given)
            if name in LOOKS or by_mask:
                seen.looks.append(f"{name}()")
            if name == "softmax":
                seen.softmax.append(names[inside[-1]])
            outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            note_read(given, outputs, f"{name}()")
            unchanged = {id(tensor) for tensor, version in given if tensor._version == version}
            for tensor in outputs:
                if id(tensor) not in unchanged:
                    made.pop(id(tensor), None)  # written to in place: no longer what the module made
            return result

    handles = []
    for module in names:
        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]
    try:
        with torch.no_grad(), Functions():
            returned = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    note_read([(tensor, -1) for tensor in tensors_in(returned)], [], RETURNED)
    return seen


def compiling() -> bool:
    """Whether this is traced, not run: torch.cond compiles its branches and, with them, what watches over them."""
    return torch.compiler.is_dynamo_compiling()


def spoken(reader: str) -> str:
    """A reader in a sentence."""
    return reader if reader.endswith("()") or reader == RETURNED else f"'{reader}'"


def is_step(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own that call no others but what belongs to them."""
    childless = not any(True for _ in module.children())
    return type(module).__module__.startswith("torch.") and (childless or isinstance(module, nn.MultiheadAttention))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _versions(value: Any) -> list[tuple[Tensor, int]]:
    return [(leaf, leaf._version) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "function")
    if name == "__get__":
        name = func.__self__.__name__
    return str(name).strip("_") if name != "_version" else name

"""Why a model could not be captured: the line of the user's own source, and what to change in it.

torch's errors name the line in a traceback, in a stack that is part of their text, or not at all; and their advice is
for those who develop torch.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from optpipe.errors import named_reason
from optpipe.task import Inputs, call

# What failed, as torch says it → what that is, and what to change. The first that fits is told.
REMEDIES: tuple[tuple[str, str, str], ...] = (
    (
        r"_detect_is_causal_mask",
        "torch.nn.Transformer looks into its mask to see whether it is causal",
        "say so: is_causal=True, or tgt_is_causal=True",
    ),
    (
        r"Data-dependent branching|[Cc]ould not guard on data-dependent expression (Eq|Ne)\(u\d+, 1\)",
        "a branch depends on the values of a tensor",
        "compute both sides and choose with torch.where, or use torch.cond; let a loop that stops early run to its end",
    ),
    (
        r"torch\.cond|cond_branch|torch\._higher_order_ops\.cond",
        "torch.cond cannot take these branches",
        "give both branches the same inputs and outputs, of equal shapes and dtypes, and let neither change its inputs",
    ),
    (
        r"\.numpy\(\)|numpy\(\) is not supported|from_numpy|[Nn]um[Pp]y",
        "a tensor goes to NumPy and leaves the graph",
        "use the function of torch",
    ),
    (
        r"data-dependent expression|specialized integer|unbacked|aten\._local_scalar_dense|\.item\(\)|DataDependent",
        "a Python number is made of a tensor's values, as by .item(), int(), float() or .tolist()",
        "keep it a tensor, or a setting of the model; a shape must not depend on values",
    ),
    (
        r"unrecognized type|not a known type|register a pytree|Unsupported (input|output) type",
        "a value that is neither a tensor nor a container of tensors enters or leaves the model",
        "name the outputs that matter (outputs of the task), return tensors, or switch it off, as by use_cache=False",
    ),
    (
        r"autograd\.Function|autograd_function|HigherOrderOperator.*autograd",
        "a torch.autograd.Function of the model's own does what a graph cannot hold",
        "write its forward with torch's operators",
    ),
    (
        r"is not a supported|does not know how to trace|Failed to trace builtin|marked as skipped|Unsupported func",
        "Python is called that is not torch's, such as files, clocks, random or logging",
        "move it out of forward",
    ),
    (
        r"requires_grad|inference tensor|leaf variable",
        "a tensor that is trained is changed in place",
        "write x = x + 1 instead of x += 1",
    ),
    (
        r"[Tt]racer cannot infer type|Only tensors.*can be output from traced|Encountering a dict at the output|"
        r"Only tensors and (possibly nested )?tuples",
        "a traced function returns tensors and tuples of them only",
        "return a tuple of tensors, or name the outputs that matter (outputs of the task)",
    ),
    (
        r"variable number of arguments|[Kk]eyword-?only|keyword argument",
        "TorchScript compiles neither *args nor **kwargs nor inputs by name only",
        "give forward named inputs",
    ),
    (
        r"could not be inferred|inferred to be|Expected (a value|integer|type)|Unknown type|not subscriptable",
        "TorchScript compiles only what has one static type",
        "annotate the types, or let torch.export capture the model",
    ),
)


@dataclass(frozen=True)
class SourceLine:
    """A line of somebody's file."""

    file: str
    number: int

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        shown = os.path.relpath(self.file) if Path(self.file).is_relative_to(Path.cwd()) else self.file
        return f"{shown}:{self.number}, `{self.text}`" if self.text else f"{shown}:{self.number}"


def explain(error: BaseException, model: nn.Module) -> str:
    """What `error` means, where in the source of `model` it happened, and what to change, in one line."""
    said = "\n".join([str(error), *(frame.name for link in _chain(error) for frame in _frames(link))])
    what, remedy = next(
        ((what, remedy) for pattern, what, remedy in REMEDIES if re.search(pattern, said)), (named_reason(error), "")
    )
    line = line_of(error, model)
    return "; ".join(filter(None, [f"{what}, at {line}" if line else what, remedy]))


def line_of(error: BaseException, model: nn.Module) -> SourceLine | None:
    """The innermost line of the user's own code that led to `error`; one of torch's layers where there is none."""
    told = lines_told(str(error))
    fallen = [SourceLine(frame.filename, frame.lineno or 0) for link in _chain(error) for frame in _frames(link)]
    return innermost([*fallen, *told], model) or next(
        (line for line in reversed([*fallen, *told]) if "/torch/nn/modules/" in line.file), None
    )


def lines_told(text: str) -> list[SourceLine]:
    """The lines that a stack in `text` names, in order."""
    return [SourceLine(file, int(number)) for file, number in re.findall(r'File "([^"]+)", line (\d+)', text)]


def innermost(lines: Iterable[SourceLine], model: nn.Module) -> SourceLine | None:
    """The last of `lines` in a file that defines a layer of `model`, or else in one that is no library's."""
    ordered, own = list(lines)[::-1], _files(model)
    return next(
        (line for line in ordered if line.file in own),
        next((line for line in ordered if not _is_library(line.file)), None),
    )


def values_read(model: nn.Module, inputs: Inputs) -> list[tuple[str, SourceLine]]:
    """Where `model`, run on `inputs`, makes Python values of tensors: ("__bool__", "item", …) and the line, once each.

    What a trace bakes in. Sizes are no such values.
    """
    with _Watch(model) as watch, torch.no_grad():
        call(model, inputs)
    return list(dict.fromkeys(watch.found))


class _Watch(TorchFunctionMode):
    READERS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__contains__")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.found = model, list[tuple[str, SourceLine]]()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "")
        if name in self.READERS:
            frames = traceback.walk_stack(sys._getframe(1))
            stack = [SourceLine(frame.f_code.co_filename, number) for frame, number in frames]
            line = innermost(stack[::-1], self.model)
            if line:
                self.found.append((name, line))
        return func(*args, **(kwargs or {}))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` behind those that caused it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _files(model: nn.Module) -> set[str]:
    """The files that define the layers of `model`, but torch's own."""
    found = set()
    for kind in {kind for module in model.modules() for kind in type(module).__mro__}:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            try:
                found.add(inspect.getsourcefile(kind) or "")
            except (TypeError, OSError):  # made up at run time
                continue
    return found


def _is_library(file: str) -> bool:
    if file.startswith("<"):
        return not linecache.getline(file, 1)
    own = Path(__file__).parent
    if Path(file).is_relative_to(own):
        return not Path(file).is_relative_to(own / "zoo")
    return any(file.startswith(folder) for folder in _library_folders())


@cache
def _library_folders() -> tuple[str, ...]:
    found = {str(Path(torch.__file__).parent.parent), sysconfig.get_path("stdlib"), str(Path(sys.executable).parent)}
    stages = sys.modules.get("optpipe.stages")
    if stages and stages.__file__:
        found.add(str(Path(stages.__file__).parent))
    return tuple(folder + os.sep for folder in {*found, *site.getsitepackages()})

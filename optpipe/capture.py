"""Capture: a module as one graph, by torch.export with sizes that stay free, or by torch.jit.

A graph gives tensors only. What else a model returns is left out, and of the tensors those that the task names are
kept, if it names any.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.jit import ScriptModule

from optpipe.errors import StageError, did_you_mean, named_reason
from optpipe.reasons import explain, innermost, line_of, lines_told, values_read
from optpipe.task import Inputs, Task, arguments, batch_of, call, leaves, map_tensors, parts_of, select

MAX_BATCH = 65536


@dataclass(frozen=True)
class Free:
    """Dimensions whose size stays free beside the batch, by the name of the input."""

    dimensions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    smallest: int = 1
    largest: int = 4096


def capture(
    model: nn.Module, task: Task, *, strict: bool, training: bool = False, free: Free | None = None
) -> ExportedProgram:
    """`model` as an ExportedProgram whose batch size is free from 1 to MAX_BATCH.

    strict: whether torch reads the Python code (by Dynamo), or runs it on tensors without values.
    training: whether dropout and batch norm are captured as they are while a model is trained.
    free: other dimensions that stay free.
    Raises StageError with the line of the model's source and what to change if it cannot be captured as one graph.
    """
    example = batch_of(task.example_inputs, 2)  # a batch of one would be specialised away
    shapes = _shapes(model, example, free or Free())
    args, kwargs = arguments(example)
    with giving_tensors(model, example, task.outputs) as module:
        if not isinstance(module, fx.GraphModule):  # which is fixed in one mode
            module.train(training)
        try:
            with silence():
                collected: Any = shapes  # which torch.export takes, but does not say
                program = torch.export.export(module, args, kwargs, dynamic_shapes=collected, strict=strict)
        except Exception as error:  # torch.export raises dozens of types for what a model may not do
            raise StageError(_reason(error, model)) from error
    if task.outputs:  # what led only to the others is not computed
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
    return program


@contextlib.contextmanager
def giving_tensors(model: nn.Module, example: Inputs, outputs: Sequence[str] = ()) -> Iterator[nn.Module]:
    """`model`, which meanwhile returns tensors, or plain dicts, lists and tuples of them, and no others than `outputs`.

    Raises StageError if the model does not run on the example, or returns no tensor.
    """
    if isinstance(model, fx.GraphModule):
        yield model
        return
    kept, signature = _kept(model, example, outputs), _signature(model, example)
    if kept is None and signature is None:
        yield model
        return
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = kind.forward(self, *args, **kwargs)
        if kept is None:
            return found
        picked = {name: _at(found, way) for name, way in kept.items()}
        return next(iter(picked.values())) if len(picked) == 1 else picked

    if signature:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    # a class of its own for a while: a module around the model would change the names of all its parts
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    try:
        yield model
    finally:
        model.__class__ = kind


def _signature(model: nn.Module, example: Inputs) -> inspect.Signature | None:
    """With the inputs that `forward` takes by `**kwargs` as inputs of their own; None where there are none.

    torch 2.13 finds no free sizes among `**kwargs`.
    """
    if not isinstance(example, dict) or set(example) <= set(inspect.signature(model.forward).parameters):
        return None
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([own, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in example)])


def _kept(model: nn.Module, example: Inputs, outputs: Sequence[str]) -> dict[str, tuple[Any, ...]] | None:
    """The tensors to keep of what `model` returns, by name, each with the way there; None if nothing is to change."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = call(model, copy.deepcopy(example))
    except Exception as error:  # the user's own model
        line = line_of(error, model)
        where = f", at {line}" if line else ""
        raise StageError(
            f"the model does not run on two of its example inputs: {named_reason(error)}{where}"
        ) from error
    finally:
        model.train(was_training)
    parts = {way: (keys, leaf) for way, keys, leaf in _walk(found)}
    tensors = {way: keys for way, (keys, leaf) in parts.items() if isinstance(leaf, Tensor)}
    if not tensors:
        raise StageError(
            f"the model returns no tensor but {', '.join(type(leaf).__name__ for _, leaf in leaves(found))}"
        )
    if outputs:
        chosen = [(name, way) for name, (way, _) in zip(outputs, select(found, outputs), strict=True)]
        if [way for _, way in chosen] == list(parts) and _is_plain(found):
            return None
        return {name: tensors[way] for name, way in chosen}
    return None if _is_plain(found) else tensors


def _walk(value: Any, way: str = "", keys: tuple[Any, ...] = ()) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """`leaves` of `value`, each with the keys that lead there too: (True, key) by index, (False, name) by attribute."""
    parts = parts_of(value)
    if parts is None:
        yield way, keys, value
        return
    if isinstance(value, Mapping):
        steps = [(True, key) for key in value]
    elif isinstance(value, (tuple, list)):
        steps = [(True, index) for index in range(len(value))]
    else:
        steps = [(False, name) for name, _ in parts]
    for (name, part), step in zip(parts, steps, strict=True):
        yield from _walk(part, f"{way}.{name}" if way else name, (*keys, step))


def _at(value: Any, way: tuple[Any, ...]) -> Any:
    for by_index, key in way:
        value = value[key] if by_index else getattr(value, key)
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if type(value) is dict:
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return type(value) in (tuple, list) and all(map(_is_plain, value))


def input_names(model: nn.Module, example: Inputs) -> list[str]:
    """The names of the inputs as `forward` has them."""
    if isinstance(example, dict):
        return list(example)
    count = len(example) if isinstance(example, tuple) else 1
    return list(inspect.signature(model.forward).parameters)[:count]


def _shapes(model: nn.Module, example: Inputs, free: Free) -> ShapesCollection:
    """What of the shape of each input stays free. Raises StageError if `free` names what is not there."""
    args, kwargs = arguments(example)
    tensors = dict(zip(input_names(model, example), [*args, *kwargs.values()], strict=True))
    batch, shapes = Dim("batch", min=1, max=MAX_BATCH), ShapesCollection()  # type: ignore[no-untyped-call]
    for name, dimensions in free.dimensions.items():
        if name not in tensors:
            raise StageError(
                f"dynamic names the input '{name}'{did_you_mean(name, tensors)}; this model takes {', '.join(tensors)}"
            )
        for dimension in dimensions:
            shape = tuple(tensors[name].shape)
            if dimension >= len(shape):
                raise StageError(f"dynamic names dimension {dimension} of '{name}', whose shape is {shape}")
            if shape[dimension] < 2:
                raise StageError(
                    f"dimension {dimension} of '{name}' is {shape[dimension]} in the example inputs, and a size of 0 "
                    "or 1 cannot stay free; give examples with at least 2"
                )
    for name, tensor in tensors.items():
        sizes: dict[int, Any] = {0: batch} if tensor.dim() else {}
        # sizes that depend on one another may stay free together: those are ranges, not names
        sizes.update({d: Dim.DYNAMIC(min=free.smallest, max=free.largest) for d in free.dimensions.get(name, ())})
        shapes[tensor] = sizes
    return shapes


def _reason(error: Exception, model: nn.Module) -> str:
    """Why torch.export refused, in one line."""
    said = str(error)
    if "Constraints violated" not in said:
        return explain(error, model)
    line = line_of(error, model)
    where = f", at {line}" if line else ""
    fixed = re.search(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", said)
    if fixed and fixed[1] == "batch":
        return (
            f"the batch size becomes a fixed number{where}, as by len(tensor), int(tensor.shape[0]) or a size written "
            "in view or expand; use tensor.shape[0]"
        )
    if fixed:
        name, dimension = re.findall(r"(\w+)'\]\.size\(\)\[(\d+)", fixed[1])[-1]
        return (
            f"dimension {dimension} of '{name}' cannot stay free: the model fixes it at {fixed[2]}{where}; take it out "
            f"of dynamic, or use {name}.shape[{dimension}] there"
        )
    detail = next((text.strip(" -") for text in said.splitlines()[1:] if text.strip()), said)
    return f"a size cannot stay free{where}: {detail}"


def sizes(program: ExportedProgram, model: nn.Module, example: Inputs) -> dict[str, tuple[int, int]]:
    """The dimensions that are free beside the batch, in words, with the smallest and largest that the graph takes."""
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [placeholders[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in zip(input_names(model, example), tensors, strict=False):
        for dimension, size in enumerate(tensor.shape[1:] if isinstance(tensor, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                limits = program.range_constraints.get(size.node.expr)
                if limits is not None:
                    found[f"dimension {dimension + 1} of '{name}'"] = (int(limits.lower), int(limits.upper))
    return found


def shortened(model: nn.Module, inputs: Inputs, free: Free) -> Inputs:
    """`inputs` with half the size, or the smallest, in every dimension of `free`."""
    names = iter(input_names(model, inputs))

    def cut(tensor: Tensor) -> Tensor:
        for dimension in free.dimensions.get(next(names), ()):
            size = tensor.shape[dimension]
            tensor = tensor.narrow(dimension, 0, min(size, max(free.smallest, size // 2)))
        return tensor

    return map_tensors(cut, inputs)


def changed_inputs(program: ExportedProgram, model: nn.Module) -> dict[str, str]:
    """The inputs that the model writes into, each with the line that does, in words."""
    inputs = set(program.graph_signature.user_inputs)
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        schema: Any = getattr(node.target, "_schema", None)
        written = node.args[0] if schema is not None and node.args else None
        if isinstance(written, fx.Node) and written.name in inputs:
            alias = schema.arguments[0].alias_info
            if alias is not None and alias.is_write:
                line = innermost(lines_told(str(node.meta.get("stack_trace"))), model)
                found.setdefault(written.name, f", at {line}" if line else "")
    return found


def trace(model: nn.Module, task: Task, *, strict: bool) -> ScriptModule:
    """What `model` does on its example inputs, as a TorchScript module.

    strict: whether dicts and lists that it returns are refused.
    Raises StageError if it cannot be traced, or if its code reads the values of a tensor: what it does with them, such
    as to stop a loop, would be as in the example, and samples that go another way may be rare.
    """
    example = batch_of(task.example_inputs, 2)
    args, kwargs = arguments(example)
    model.eval()
    with giving_tensors(model, example, task.outputs) as module:
        for reader, line in values_read(module, example):
            what = "a branch that depends on" if reader == "__bool__" else f"the number that {reader} makes of"
            raise StageError(
                f"a trace would bake in {what} the values of a tensor, at {line}; choose with torch.where, let a loop "
                "that stops early run to its end, and leave numbers for reports out of forward"
            )
        try:
            with silence(), torch.no_grad():
                found = torch.jit.trace(  # type: ignore[no-untyped-call]
                    module, args or None, example_kwarg_inputs=kwargs or None, strict=strict, check_trace=False
                )
        except Exception as error:  # torch.jit raises whatever it meets
            raise StageError(explain(error, model)) from error
    return found  # type: ignore[no-any-return]


def script(model: nn.Module) -> ScriptModule:
    """What the code of `model` says, as a TorchScript module. Raises StageError if it cannot be compiled."""
    try:
        with silence():
            return torch.jit.script(model.eval())  # type: ignore[no-any-return]
    except Exception as error:  # torch.jit raises whatever it meets
        raise StageError(explain(error, model)) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what torch prints and warns about while it reads a model: an error says it all."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

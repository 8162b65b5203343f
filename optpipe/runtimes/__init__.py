"""What runs a model. One file per engine, each with the same names.

    NAME                          the engine's name in `target.runtime`
    runner(model, threads)        a callable: NumPy arrays in (by position or by name), a list of NumPy arrays out

A new engine is one new file here, and its name with the form that it takes in RUNTIMES. Measuring workers import these
files, so they import torch only if they run it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

from optpipe.errors import OptpipeError
from optpipe.machine import usable_cores

Runner = Callable[..., list[Any]]

# the form that each takes, known without importing it
RUNTIMES = {"torch": "torch", "onnxruntime": "onnx", "openvino": "onnx"}
OPTIONAL = {"openvino"}  # installed by optpipe's extra of the same name


class Runtime(Protocol):
    """The names that each module of this package has."""

    NAME: str

    def runner(self, model: Any, threads: int) -> Runner: ...


def missing(name: str) -> bool:
    """Whether the engine called `name` is not installed."""
    return name in OPTIONAL and importlib.util.find_spec(name) is None


def runtime(name: str) -> Runtime:
    """The engine called `name`. Raises OptpipeError if it is not installed."""
    if missing(name):
        raise OptpipeError(f'{name} is not installed here; pip install "optpipe[{name}]"')
    module: Any = importlib.import_module(f"optpipe.runtimes.{name}")
    return module  # type: ignore[no-any-return]


def evaluator(model: Any, name: str) -> Callable[..., Any]:
    """`model` as a callable on torch tensors: in the engine called `name` where that takes its form."""
    from optpipe.forms import form_of

    current = form_of(model)
    assert current is not None
    if name == "torch" or RUNTIMES[name] != current.NAME:
        return current.as_callable(model)
    return as_model(runtime(name).runner(model, usable_cores()))


def as_model(runner: Runner) -> Callable[..., Any]:
    """`runner` as a callable on torch tensors: one output is a tensor, several are a tuple."""
    import torch

    def model(*args: Any, **kwargs: Any) -> Any:
        arrays = runner(*(a.numpy() for a in args), **{name: a.numpy() for name, a in kwargs.items()})
        outputs = tuple(torch.from_numpy(array) for array in arrays)
        return outputs[0] if len(outputs) == 1 else outputs

    return model

"""What runs a model. One file per engine, each with the same names.

    NAME                          the engine's name in `target.runtime`
    runner(model, threads)        a callable: NumPy arrays in (by position or by name), a list of NumPy arrays out

A new engine is one new file here, and its name with the form that it takes in RUNTIMES. Measuring workers import these
files, so they import torch only if they run it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

Runner = Callable[..., list[Any]]

RUNTIMES = {"torch": "torch", "onnxruntime": "onnx"}  # the form that each takes, known without importing it


class Runtime(Protocol):
    """The names that each module of this package has."""

    NAME: str

    def runner(self, model: Any, threads: int) -> Runner: ...


def runtime(name: str) -> Runtime:
    """The engine called `name`."""
    module: Any = importlib.import_module(f"optpipe.runtimes.{name}")
    return module  # type: ignore[no-any-return]


def as_model(runner: Runner) -> Callable[..., Any]:
    """`runner` as a callable on torch tensors: one output is a tensor, several are a tuple."""
    import torch

    def model(*args: Any, **kwargs: Any) -> Any:
        arrays = runner(*(a.numpy() for a in args), **{name: a.numpy() for name, a in kwargs.items()})
        outputs = tuple(torch.from_numpy(array) for array in arrays)
        return outputs[0] if len(outputs) == 1 else outputs

    return model

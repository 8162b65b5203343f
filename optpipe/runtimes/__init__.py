"""What runs a model. One file per engine, each with the same names.

    NAME                                   the engine's name in `target.runtime`
    Options                                its settings in `target.options`, a dataclass
    runner(model, threads, device, options)   a callable: NumPy arrays in (by position or by name), a list of them out
    lower(program, folder, task)           how an exported program becomes a file that it runs, where it runs files

A new engine is one new file here, its name with the forms that it takes in RUNTIMES, and its Options in
optpipe.runtimes.options. Measuring workers import these files, so they import torch only if they run it.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from optpipe.errors import OptpipeError, did_you_mean
from optpipe.machine import usable_cores
from optpipe.runtimes.options import OPTIONS

if TYPE_CHECKING:
    from pathlib import Path

    from torch.export import ExportedProgram

    from optpipe.forms import ExportedFile
    from optpipe.task import Task

Runner = Callable[..., list[Any]]

# the forms that each takes, known without importing it; models are lowered to the first for previews
RUNTIMES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnx",),
    "openvino": ("onnx", "openvino"),
    "aotinductor": ("aotinductor",),
    "executorch": ("executorch",),
    "tensorrt": ("tensorrt",),
    "torch": ("torch", "program", "torchscript"),
}
OPTIONAL = ("openvino", "executorch", "tensorrt")  # installed by optpipe's extras of the same names
IN_PROCESS = ("torch", "onnxruntime")  # a run would go down with any other that crashes


class Runtime(Protocol):
    """The names that each module of this package has."""

    NAME: str

    def runner(self, model: Any, threads: int, device: str, options: Any) -> Runner: ...
    def lower(self, program: ExportedProgram, folder: Path, task: Task, **settings: Any) -> ExportedFile: ...


def missing(name: str) -> bool:
    """Whether the engine called `name` is not installed."""
    return name in OPTIONAL and importlib.util.find_spec(name) is None


def installed_for(form_name: str) -> list[str]:
    """The engines that are installed and take `form_name`."""
    return [name for name, taken in RUNTIMES.items() if form_name in taken and not missing(name)]


def engine_of(form_name: str, preferred: str = "") -> str:
    """The engine that runs a model of `form_name`: the preferred one if it can, else the first that takes it."""
    if preferred and form_name in RUNTIMES[preferred]:
        return preferred
    return next(name for name, taken in RUNTIMES.items() if form_name in taken)


def runtime(name: str) -> Runtime:
    """The engine called `name`. Raises OptpipeError if it is not installed."""
    if missing(name):
        raise OptpipeError(f'{name} is not installed here; pip install "optpipe[{name}]"')
    module: Any = importlib.import_module(f"optpipe.runtimes.{name}")
    return module  # type: ignore[no-any-return]


def all_threads(name: str) -> int:
    """Threads for work that is not timed: a core each, or what the engine called `name` insists on."""
    return os.cpu_count() or 1 if name == "executorch" else usable_cores()


def make_runner(
    name: str, model: Any, threads: int = 0, device: str = "cpu", options: dict[str, Any] | None = None
) -> Runner:
    """A runner of `model` in the engine called `name`; by default on all cores. OptpipeError if it is missing."""
    return runtime(name).runner(model, threads or all_threads(name), device, OPTIONS[name](**(options or {})))


def setting_problems(name: str, device: str, threads: int, options: dict[str, Any]) -> list[str]:
    """What is wrong with the target's device, threads and options for the engine called `name`."""
    if device != "cpu" and name in ("openvino", "executorch", "aotinductor"):
        return [f"target.device is '{device}', but {name} runs on cpu here"]
    if device == "cpu" and name == "tensorrt":
        return ["target.runtime=tensorrt runs on a GPU; set target.device=cuda where there is one"]
    if name == "onnxruntime" and (device != "cpu" or options.get("providers")):
        import onnxruntime as ort

        if absent := sorted(set(options.get("providers") or []) - set(ort.get_available_providers())):
            return [
                f"target.options: this ONNX Runtime has no provider '{absent[0]}'; it has "
                f"{', '.join(ort.get_available_providers())}"
            ]
        if device != "cpu" and "CUDAExecutionProvider" not in ort.get_available_providers():
            return [
                f"target.device is '{device}', but this ONNX Runtime is built for processors only; pip install "
                "onnxruntime-gpu in its place"
            ]
    if name == "executorch" and threads != os.cpu_count():
        return [
            f"target.threads is {threads}, but ExecuTorch's Python bindings always use every core; set it to "
            f"{os.cpu_count()} here"
        ]
    known = [field.name for field in dataclasses.fields(OPTIONS[name])]
    unknown = [key for key in options if key not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known) or f"; it has {', '.join(known) or 'none'}"
        return [f"target.options: {name} has no option '{unknown[0]}'{hint}"]
    try:
        OPTIONS[name](**options)
    except ValueError as error:
        return [f"target.options: {error}"]
    return []


def as_model(runner: Runner) -> Callable[..., Any]:
    """`runner` as a callable on torch tensors: one output is a tensor, several are a tuple."""
    import torch

    def model(*args: Any, **kwargs: Any) -> Any:
        arrays = runner(*(a.numpy() for a in args), **{name: a.numpy() for name, a in kwargs.items()})
        outputs = tuple(torch.from_numpy(array) for array in arrays)
        return outputs[0] if len(outputs) == 1 else outputs

    return model

"""Where the model and the task come from: any importable callable, and a weights file."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe.errors import RecipeError, did_you_mean, named_reason
from optpipe.forms import SPOKEN

if TYPE_CHECKING:
    from torch import nn

    from optpipe.task import Task

MISSING = "???"  # OmegaConf's mark for a value that must be given
FILES = ("onnx", "program")  # the forms that a model may come in as, beside a module from a factory


@dataclass(kw_only=True)
class Model:
    """The settings under `model:`."""

    factory: str = ""  # dotted path of a callable that returns an nn.Module
    args: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    weights: str | None = None  # a state dict: .safetensors, or .pt read with weights_only=True
    path: str | None = None  # in place of a factory: a file that holds the whole model
    format: str = "torch"  # of that file: onnx, or program (torch.export.save)

    @property
    def form(self) -> str:
        """What the model is when it comes in."""
        return self.format

    @property
    def name(self) -> str:
        """As it is spoken of."""
        return self.path or self.factory


@dataclass(kw_only=True)
class Data:
    """The settings under `data:`."""

    factory: str = MISSING  # dotted path of a callable that returns an optpipe.Task
    args: dict[str, Any] = field(default_factory=dict)


def problems(model: Model, data: Data) -> list[str]:
    """What can be seen to be wrong without importing or reading anything heavy."""
    found = _file_problems(model)
    factories = {"model.factory": model.factory, "data.factory": data.factory}
    if model.format != "torch":
        del factories["model.factory"]
    for key, factory in factories.items():
        module, _, _ = factory.rpartition(".")
        if factory == MISSING or not module:
            found.append(f"{key} is '{factory}'; it must be the dotted path of a callable, for example my_package.make")
        elif (reason := _not_importable(module)) is not None:
            found.append(
                f"{key} is '{factory}', but {reason}; start optpipe in the folder that holds it, or install it"
            )
    if model.weights and not Path(model.weights).is_file():
        found.append(f"model.weights is '{model.weights}', which is not a file; give the path of a state dict")
    return found


def _file_problems(model: Model) -> list[str]:
    """Of a model that starts as a file, or is half said to."""
    if model.format == "torch":
        given = f"model.path is '{model.path}', but model.format is torch; choose model=onnx or model=program"
        return [given] if model.path else []
    if model.format not in FILES:
        return [f"model.format is '{model.format}'; it must be one of {', '.join(FILES)}, or torch for a factory"]
    if not model.path:
        return [f"model={model.format} needs model.path=…, the path of {SPOKEN[model.format]}"]
    if not Path(model.path).is_file():
        return [f"model.path is '{model.path}', which is not a file; give the path of {SPOKEN[model.format]}"]
    if beside := [name for name in ("factory", "args", "weights") if getattr(model, name)]:
        return [f"model={model.format} starts from a file, so that model.{beside[0]} means nothing; leave it out"]
    return []


def _not_importable(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # importing the parent package runs the user's code
        return f"'{module}' cannot be imported ({type(error).__name__}: {error})"
    return None if found else f"there is no module '{module}'"


def build_task(data: Data, subject: str) -> Task:
    """Call the data factory. Raises RecipeError if that fails."""
    task: Task = call_factory("data.factory", data.factory, data.args, subject)
    return task


def build_model(model: Model, subject: str) -> Any:
    """The model of `model.path`, or of the factory and its weights file. Raises RecipeError if that fails."""
    if model.format != "torch":
        return _from_file(Path(model.path or ""), model.format, subject)
    module: nn.Module = call_factory("model.factory", model.factory, model.args, subject)
    if model.weights:
        _load_weights(module, Path(model.weights), subject)
    return module


def _from_file(path: Path, format: str, subject: str) -> Any:
    """An ONNX file or exported program. An exported program may run what it holds: open only those that you trust."""
    from optpipe.forms import ExportedFile

    try:
        if format == "program":
            from optpipe.forms.program import read

            return read(path)
        import onnx

        proto = onnx.load(path, load_external_data=False)
        beside = {
            entry.value
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        if beside - {"model.onnx.data"}:
            raise ValueError(
                f"its weights lie in {', '.join(sorted(beside))}; save it with onnx.save_model(…, "
                "save_as_external_data=True, location='model.onnx.data')"
            )
        onnx.checker.check_model(str(path))
    except Exception as error:  # every reader has error types of its own
        said = f"which cannot be read as {SPOKEN[format]} ({named_reason(error)})"
        raise RecipeError([f"model.path is '{path}', {said}"], subject) from error
    return ExportedFile(path, format)


def call_factory(setting: str, factory: str, args: dict[str, Any], subject: str) -> Any:
    """Call what the dotted path `factory`, given by `setting`, names. Raises RecipeError if that fails."""
    module_name, _, name = factory.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code: whatever it raises is theirs to read
        reason = f"importing '{module_name}' failed ({type(error).__name__}: {error})"
        raise RecipeError([f"{setting} is '{factory}', but {reason}"], subject) from error
    function = getattr(module, name, None)
    if not callable(function):
        hint = did_you_mean(name, vars(module))
        raise RecipeError([f"{setting} is '{factory}', but '{module_name}' has no callable '{name}'{hint}"], subject)
    try:
        return function(**args)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        raise RecipeError([f"{setting} '{factory}' raised {type(error).__name__}: {error}"], subject) from error


def _load_weights(module: nn.Module, path: Path, subject: str) -> None:
    try:
        state = _read(path)
    except Exception as error:  # every reader has error types of its own
        text = str(error).strip().splitlines() or [""]
        raise RecipeError(
            [
                f"model.weights is '{path}', which cannot be read as a state dict ({type(error).__name__}: {text[0]}); "
                "give a .safetensors file, or a .pt file of torch.save(model.state_dict(), path)"
            ],
            subject,
        ) from error
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]] or [str(error)]
        raise RecipeError(
            [f"model.weights is '{path}', which does not fit {type(module).__name__}: {' '.join(lines)}"], subject
        ) from error


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        import safetensors.torch

        return safetensors.torch.load_file(str(path))
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)

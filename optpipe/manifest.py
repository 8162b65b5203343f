"""The deployable model of a run, model/ with its manifest.json, and `load`, which calls it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe.errors import OptpipeError
from optpipe.fingerprint import package_versions
from optpipe.forms import form
from optpipe.runtimes import Runner, make_runner

if TYPE_CHECKING:
    from optpipe.target import Target
    from optpipe.task import Task

FOLDER = "model"
FILE = "manifest.json"


def deploy(model: Any, form_name: str, run_folder: Path, target: Target, engine: str, task: Task) -> Path:
    """Write the model that came out of a run, and what one must know to call it in `engine`, to `run_folder`/model."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    form(form_name).save(model, folder)
    files = {path.name: facts(path) for path in sorted(folder.iterdir()) if path.name != FILE}
    manifest = {
        "schema": 1,
        "form": form_name,
        "files": files,
        "runtime": engine,
        "options": target.options if engine == target.runtime else {},
        **_signature(folder, form_name, task),
        "target": {
            "runtime": target.runtime,
            "device": target.device,
            "threads": target.threads,
            "instruction_set": target.int8_instructions().value,
        },
        "versions": package_versions(),
        "load": "optpipe.load(RUN_FOLDER)(array)",
    }
    (folder / FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


def facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


def _signature(folder: Path, form_name: str, task: Task) -> dict[str, Any]:
    """Names, types and shapes of inputs and outputs."""
    if form_name != "onnx":
        return {"inputs": task.input_names or [], "outputs": task.output_names or []}
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph

    def describe(value: Any) -> dict[str, Any]:
        tensor = value.type.tensor_type
        shape = [dimension.dim_param or dimension.dim_value for dimension in tensor.shape.dim]
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return {"name": value.name, "dtype": dtype, "shape": shape}

    return {"inputs": [*map(describe, graph.input)], "outputs": [*map(describe, graph.output)]}


class DeployedModel:
    """A deployed model as a callable: NumPy arrays in, by position or by name; one array or a list of them out."""

    def __init__(self, manifest: dict[str, Any], runner: Runner) -> None:
        self.manifest = manifest
        self._runner = runner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._runner(*args, **kwargs)
        return outputs[0] if len(outputs) == 1 else outputs


def read(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of the run in `run_folder`. Raises OptpipeError if there is none, or it cannot be read."""
    file = Path(run_folder) / FOLDER / FILE
    if not file.exists():
        raise OptpipeError(f"{run_folder} holds no deployed model ({file} is missing); name a finished run")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        missing = sorted({"form", "files", "runtime", "target"} - set(manifest))
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        if outside := [name for name in manifest["files"] if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]}, which is not in its folder")
    except (OSError, ValueError, TypeError) as error:
        raise OptpipeError(f"{file} cannot be read ({error}); run the recipe again") from None
    return manifest


def load(run_folder: str | os.PathLike[str], threads: int | None = None) -> DeployedModel:
    """The deployed model of the run in `run_folder`, ready to be called.

    threads: of one call; by default those of the run's target.
    Raises OptpipeError if the folder holds no finished run, or a file is not the one that the run wrote. A model that
    was deployed as a torch module is unpickled: load only runs that you trust.
    """
    folder = Path(run_folder) / FOLDER
    manifest = read(run_folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).exists() or facts(folder / name) != expected:
            raise OptpipeError(
                f"{folder / name} is missing or is not the file that the run wrote; run the recipe again"
            )
    model = form(manifest["form"]).load(folder)
    name = manifest["runtime"]
    settings = threads or manifest["target"]["threads"], manifest["target"]["device"], manifest.get("options")
    return DeployedModel(manifest, make_runner(name, model, *settings))

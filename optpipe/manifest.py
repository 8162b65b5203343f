"""The deployable model of a run: model/ with its manifest.json. `optpipe.deployed` calls it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe.errors import OptpipeError
from optpipe.fingerprint import package_versions
from optpipe.forms import form
from optpipe.signature import of_module, of_program

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
        **_signature(model, folder, form_name, task),
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
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _signature(model: Any, folder: Path, form_name: str, task: Task) -> dict[str, Any]:
    """Names, types and shapes of inputs and outputs. A size is a number, the name of one that is free, or None."""
    if form_name != "onnx":
        inputs = of_program(model, task) if form_name == "program" else of_module(model, task)
        return {"inputs": inputs, "outputs": task.output_names or []}
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}  # old files list them as inputs too

    def describe(value: Any) -> dict[str, Any]:
        tensor = value.type.tensor_type
        shape = [
            size.dim_param or (size.dim_value if size.HasField("dim_value") else None) for size in tensor.shape.dim
        ]
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return {"name": value.name, "dtype": dtype, "shape": shape if tensor.HasField("shape") else None}

    inputs = [describe(value) for value in graph.input if value.name not in weights]
    return {"inputs": inputs, "outputs": [*map(describe, graph.output)]}


def read(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of the run in `run_folder`. Raises OptpipeError if there is none, or it cannot be read."""
    file = Path(run_folder) / FOLDER / FILE
    if not file.exists():
        raise OptpipeError(f"{run_folder} holds no deployed model ({file} is missing); name a finished run")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        missing = sorted({"form", "files", "inputs", "runtime", "target"} - set(manifest))
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        if not isinstance(manifest["files"], dict):
            raise ValueError("its files have no sums")
        if outside := [name for name in manifest["files"] if Path(name).name != name]:
            raise ValueError(f"it names {outside[0]}, which is not in its folder")
    except (OSError, ValueError, TypeError) as error:
        raise OptpipeError(f"{file} cannot be read ({error}); run the recipe again") from None
    return manifest

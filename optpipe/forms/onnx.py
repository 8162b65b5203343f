"""The form "onnx": an ExportedFile with an ONNX graph.

Its bytes hold no debug metadata (optpipe.lower strips it) and repeat for equal models, so its hash is that of the file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optpipe.forms import ExportedFile
from optpipe.machine import usable_cores

NAME = "onnx"
FILE = "model.onnx"


def matches(model: Any) -> bool:
    return isinstance(model, ExportedFile) and model.format == NAME


def save(model: ExportedFile, folder: Path) -> None:
    if model.path != folder / FILE:
        shutil.copyfile(model.path, folder / FILE)


def load(folder: Path) -> ExportedFile:
    return ExportedFile(folder / FILE, NAME)


def files(folder: Path) -> list[Path]:
    return [folder / FILE]


def size_bytes(folder: Path) -> int:
    return (folder / FILE).stat().st_size


def as_callable(model: ExportedFile) -> Callable[..., Any]:
    from optpipe.runtimes import as_model, runtime

    return as_model(runtime("onnxruntime").runner(model, usable_cores()))


def content_hash(model: ExportedFile) -> str:
    return hashlib.sha256(model.path.read_bytes()).hexdigest()

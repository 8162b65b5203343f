"""What a model can be between two stages. One file per form, each with the same names.

    NAME                    the form's name in `takes=` and `gives=`
    matches(model)          whether an object is of this form
    save(model, folder)     write it; `load(folder)` gives it back
    files(folder)           those that would be shipped
    size_bytes(folder)      their bytes
    as_callable(model)      what evaluates it: torch tensors in, torch tensors out
    content_hash(model)     sha256 of graph and tensors, never of file bytes: some formats differ on every save

A new form is one new file here and its name in FORMS, or an entry in optpipe.forms.exported.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from optpipe.forms.exported import EXPORTED
from optpipe.forms.exported import ExportedFile as ExportedFile

FORMS = ("torchscript", "torch", "program", *EXPORTED)
SPOKEN = {
    "torch": "a torch module",
    "program": "an exported program",
    "torchscript": "a TorchScript module",
    "onnx": "an ONNX file",
    "openvino": "an OpenVINO IR",
    "aotinductor": "an AOTInductor package",
    "executorch": "an ExecuTorch program",
    "tensorrt": "a TensorRT engine",
}


class Form(Protocol):
    """The names that each form has."""

    @property
    def NAME(self) -> str: ...

    def matches(self, model: Any) -> bool: ...
    def save(self, model: Any, folder: Path) -> None: ...
    def load(self, folder: Path) -> Any: ...
    def files(self, folder: Path) -> list[Path]: ...
    def size_bytes(self, folder: Path) -> int: ...
    def as_callable(self, model: Any) -> Callable[..., Any]: ...
    def content_hash(self, model: Any) -> str: ...


def form(name: str) -> Form:
    """The form called `name`."""
    if name in EXPORTED:
        return EXPORTED[name]
    module: Any = importlib.import_module(f"optpipe.forms.{name}")
    return module  # type: ignore[no-any-return]


def form_of(model: Any) -> Form | None:
    """The form of `model`, or None if it has none of FORMS."""
    return next((candidate for candidate in map(form, FORMS) if candidate.matches(model)), None)


def compressed_bytes(form: Form, folder: Path) -> int:
    """What a download of the shipped files takes: deflate at level 6, as web servers and zip do by default."""
    total = 0
    for path in form.files(folder):
        packer = zlib.compressobj(6)
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total

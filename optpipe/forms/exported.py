"""Forms that are files for an engine outside Python: an ExportedFile, its format the form's name.

Their hash is that of the files. An ONNX file repeats for equal models: optpipe.lower strips what only debuggers read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optpipe.errors import StageError


@dataclass(frozen=True)
class ExportedFile:
    """A model in a file of its own, for a runtime outside Python."""

    path: Path
    format: str  # "onnx", "openvino", …


@dataclass(frozen=True)
class ExportedForm:
    """One such form, with the names that each module of this package has."""

    NAME: str
    FILES: tuple[str, ...]  # the one that is opened first, then those that it may need beside it

    @property
    def FILE(self) -> str:
        return self.FILES[0]

    def matches(self, model: Any) -> bool:
        return isinstance(model, ExportedFile) and model.format == self.NAME

    def save(self, model: ExportedFile, folder: Path) -> None:
        """Copy the files, the one that is opened under its own name here. Raises StageError if it is missing."""
        if not model.path.is_file():
            raise StageError(f"{model.path} does not exist, which should be the {self.NAME} file")
        for path in self._of(model):
            if path.parent != folder:
                shutil.copyfile(path, folder / (self.FILE if path == model.path else path.name))

    def load(self, folder: Path) -> ExportedFile:
        return ExportedFile(folder / self.FILE, self.NAME)

    def files(self, folder: Path) -> list[Path]:
        return [folder / name for name in self.FILES if (folder / name).exists()]

    def _of(self, model: ExportedFile) -> list[Path]:
        beside = (model.path.parent / name for name in self.FILES[1:])
        return [model.path, *(path for path in beside if path.exists())]

    def size_bytes(self, folder: Path) -> int:
        return sum(path.stat().st_size for path in self.files(folder))

    def as_callable(self, model: ExportedFile) -> Callable[..., Any]:
        from optpipe.runtimes import as_model, engine_of, make_runner

        return as_model(make_runner(engine_of(self.NAME), model))

    def content_hash(self, model: ExportedFile) -> str:
        digest = hashlib.sha256()
        for path in self._of(model):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


EXPORTED = {
    form.NAME: form
    for form in (
        ExportedForm("onnx", ("model.onnx", "model.onnx.data")),
        ExportedForm("openvino", ("model.xml", "model.bin")),
        ExportedForm("aotinductor", ("model.pt2",)),
        ExportedForm("executorch", ("model.pte", "model.ptd")),
        ExportedForm("tensorrt", ("model.engine",)),
    )
}

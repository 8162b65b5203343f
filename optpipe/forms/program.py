"""The form "program": a torch.export.ExportedProgram."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from optpipe.forms.torch import update_with_tensor
from optpipe.progress import quiet

NAME = "program"
FILE = "program.pt2"


def matches(model: Any) -> bool:
    return isinstance(model, ExportedProgram)


def save(model: ExportedProgram, folder: Path) -> None:
    torch.export.save(model, folder / FILE)


def load(folder: Path) -> ExportedProgram:
    return read(folder / FILE)


def read(path: Path) -> ExportedProgram:
    """The program in a file of torch.export.save."""
    with quiet("torch"):
        return torch.export.load(path)


def files(folder: Path) -> list[Path]:
    return [folder / FILE]


def size_bytes(folder: Path) -> int:
    return (folder / FILE).stat().st_size


def as_callable(model: ExportedProgram) -> Callable[..., Any]:
    return model.module()


def content_hash(model: ExportedProgram) -> str:
    digest = hashlib.sha256(model.graph_module.code.encode())
    for name, tensor in sorted({**model.state_dict, **model.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            update_with_tensor(digest, name, tensor)
    return digest.hexdigest()

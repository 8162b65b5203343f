"""The form "program": a torch.export.ExportedProgram."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from optpipe.forms.torch import update_with_tensor

NAME = "program"


def matches(model: Any) -> bool:
    return isinstance(model, ExportedProgram)


def save(model: ExportedProgram, folder: Path) -> None:
    torch.export.save(model, folder / "program.pt2")


def load(folder: Path) -> ExportedProgram:
    return torch.export.load(folder / "program.pt2")


def files(folder: Path) -> list[Path]:
    return [folder / "program.pt2"]


def size_bytes(folder: Path) -> int:
    return (folder / "program.pt2").stat().st_size


def as_callable(model: ExportedProgram) -> Callable[..., Any]:
    return model.module()


def content_hash(model: ExportedProgram) -> str:
    digest = hashlib.sha256(model.graph_module.code.encode())
    for name, tensor in sorted({**model.state_dict, **model.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            update_with_tensor(digest, name, tensor)
    return digest.hexdigest()

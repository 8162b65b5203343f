"""The form "program": a torch.export.ExportedProgram."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from optpipe.forms.torch import graph_code, update_with_tensor
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
    digest = hashlib.sha256("\n".join([graph_code(model.graph_module), *_inputs(model)]).encode())
    for name, tensor in sorted({**model.state_dict, **model.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            update_with_tensor(digest, name, tensor)
    return digest.hexdigest()


def _inputs(model: ExportedProgram) -> list[str]:
    """Type and shape of each input; a size that is free by the order in which such come, and by what it may be."""
    free: dict[str, str] = {}
    ranges = {str(symbol): limits for symbol, limits in model.range_constraints.items()}

    def spoken(size: Any) -> str:
        name = str(size)
        return name if isinstance(size, int) else f"{free.setdefault(name, f'd{len(free)}')} {ranges.get(name)}"

    own = set(model.graph_signature.user_inputs)
    held = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder" and node.name in own]
    return [
        f"{value.dtype} {[spoken(size) for size in value.shape]}" if isinstance(value, torch.Tensor) else repr(value)
        for value in held
    ]

"""The form "torchscript": a torch.jit.ScriptModule, traced or compiled.

It is saved by torch.jit and needs no Python to run. Its hash is that of its code and tensors.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.jit import ScriptModule

from optpipe.forms.torch import update_with_tensor

NAME = "torchscript"
FILE = "model.pt"


def matches(model: Any) -> bool:
    return isinstance(model, ScriptModule)


def save(model: ScriptModule, folder: Path) -> None:
    with _without_deprecation():
        torch.jit.save(model, str(folder / FILE))


def load(folder: Path) -> ScriptModule:
    with _without_deprecation():
        return torch.jit.load(str(folder / FILE))  # type: ignore[no-any-return, no-untyped-call]


def files(folder: Path) -> list[Path]:
    return [folder / FILE]


def size_bytes(folder: Path) -> int:
    return (folder / FILE).stat().st_size


def as_callable(model: ScriptModule) -> Callable[..., Any]:
    return model


def content_hash(model: ScriptModule) -> str:
    digest = hashlib.sha256("\n".join(str(module.code) for module in model.modules()).encode())
    for name, tensor in sorted(model.state_dict().items()):
        update_with_tensor(digest, name, tensor)
    return digest.hexdigest()


def _without_deprecation() -> warnings.catch_warnings[None]:
    """torch.jit is deprecated in favour of torch.export, which cannot capture every model."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)

"""The form "torchscript": a torch.jit.ScriptModule, deprecated by torch and still what some deployments load.

Written by torch.jit.save, whose archive holds code and weights. It is read back from a run's own folder only: loading
one runs what it holds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from optpipe.forms.torch import update_with_tensor

NAME = "torchscript"
FILE = "model.ts"


def matches(model: Any) -> bool:
    return isinstance(model, torch.jit.ScriptModule)


def save(model: torch.jit.ScriptModule, folder: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        torch.jit.save(model, str(folder / FILE))


def load(folder: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        module: torch.jit.ScriptModule = torch.jit.load(str(folder / FILE), map_location="cpu")  # type: ignore[no-untyped-call]
    return module.eval()


def files(folder: Path) -> list[Path]:
    return [folder / FILE]


def size_bytes(folder: Path) -> int:
    return (folder / FILE).stat().st_size


def as_callable(model: torch.jit.ScriptModule) -> Callable[..., Any]:
    return model


def content_hash(model: torch.jit.ScriptModule) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if hasattr(module, "code"):
            code, constants = module.code_with_constants  # in which a frozen module keeps its weights
            digest.update(f"{name}\n{code}".encode())
            for key, value in sorted(constants.const_mapping.items()):
                if isinstance(value, torch.Tensor):
                    update_with_tensor(digest, key, value)
    for name, tensor in sorted(model.state_dict().items()):
        update_with_tensor(digest, name, tensor)
    return digest.hexdigest()

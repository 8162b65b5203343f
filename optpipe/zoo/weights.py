"""What the zoo makes once on a machine and keeps in the user's cache: weights of its networks, and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from optpipe.machine import machine_lock, user_cache

T = TypeVar("T", bound=nn.Module)


def trained_once(name: str, model: T, train: Callable[[T], None]) -> T:
    """`model` with the weights kept under `name`, in eval mode; the first call on a machine makes them by `train`."""
    import safetensors.torch

    def write(path: Path) -> None:
        with machine_lock().working():
            train(model)
        safetensors.torch.save_model(model, str(path))

    safetensors.torch.load_model(model, str(_made_once(name, write)))
    return model.eval()


def read_once(name: str, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept under `name`; the first call on a machine gets them by `read`, which may import what is slow."""
    import safetensors.torch

    path = _made_once(name, lambda path: safetensors.torch.save_file(read(), str(path)))
    return safetensors.torch.load_file(str(path))


def _made_once(name: str, write: Callable[[Path], None]) -> Path:
    from filelock import FileLock

    path = user_cache() / "zoo" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True, mode=0o700)
    with FileLock(path.with_suffix(".lock")):  # two first runs at once: one makes it, the other waits
        if not path.exists():
            partial = path.with_suffix(".partial")
            write(partial)
            partial.rename(path)
    return path

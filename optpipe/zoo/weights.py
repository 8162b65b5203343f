"""Weights of the zoo's networks: trained by the first run that needs them, kept in the user's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from optpipe.machine import machine_lock, user_cache

T = TypeVar("T", bound=nn.Module)


def trained_once(name: str, model: T, train: Callable[[T], None]) -> T:
    """`model` with the weights kept under `name`, in eval mode; the first call on a machine makes them by `train`."""
    import safetensors.torch
    from filelock import FileLock

    weights = user_cache() / "zoo" / f"{name}.safetensors"
    weights.parent.mkdir(exist_ok=True, mode=0o700)
    with FileLock(weights.with_suffix(".lock")):  # two first runs at once: one trains, the other waits
        if not weights.exists():
            with machine_lock().working():
                train(model)
            partial = weights.with_suffix(".partial")
            safetensors.torch.save_model(model, str(partial))
            partial.rename(weights)
        safetensors.torch.load_model(model, str(weights))
    return model.eval()

"""Undo: how a model was before something was removed from it."""

from __future__ import annotations

from typing import Any

from torch import nn


def snapshot(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What `restore` needs to take back a removal: it makes new tensors and leaves the old ones as they were."""
    kept = []
    for module in model.modules():
        state = dict(module.__dict__)
        for name, value in state.items():
            if name in ("_parameters", "_buffers") or isinstance(value, list):
                state[name] = value.copy()
        kept.append((module, state))
    return kept


def restore(before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, state in before:
        module.__dict__.clear()
        module.__dict__.update(state)


def tied_parameters(model: nn.Module) -> list[list[tuple[str, str]]]:
    """The (module, parameter) names that hold one and the same parameter, for each that is shared."""
    places: dict[int, list[tuple[str, str]]] = {}
    for layer, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((layer, name))
    return [found for found in places.values() if len(found) > 1]

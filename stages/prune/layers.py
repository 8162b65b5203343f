"""Layers: those of a model that can be pruned, and those that the user's patterns name."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING

from optpipe.errors import StageError
from optpipe.patterns import matching

if TYPE_CHECKING:
    from torch import nn


class Scope(Enum):
    """Within what the least important parts are looked for."""

    layer = "layer"  # the same share of every layer
    model = "model"  # one ranking over the whole model: some layers lose more than others


def channels_of(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by name."""
    from torch import nn

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module.weight.shape[0] for name, module in model.named_modules() if isinstance(module, layers)}


def chosen(names: Iterable[str], layers: list[str], keep: list[str]) -> list[str]:
    """Those of `names` that `layers` matches (all, where it is empty) and `keep` does not."""
    known = list(names)
    kept = matching(known, keep, "keep")
    return [name for name in (matching(known, layers, "layers") if layers else known) if name not in kept]


def check_finite(model: nn.Module) -> None:
    """Raise StageError for a parameter with a value that is no number: nothing can be ranked by it."""
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise StageError(f"'{name}' holds NaN or infinity, so its weights cannot be ranked; train it again")

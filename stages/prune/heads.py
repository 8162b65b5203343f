"""Heads: which layers are split into attention heads, read from what a forward pass does with their outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optpipe.task import Inputs, call


def heads_in(model: nn.Module, inputs: Inputs) -> dict[nn.Module, int]:
    """The linear layers whose output is at once split into (heads, width of a head), and how many heads that are."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept so that its id stays taken
    found: dict[nn.Module, int] = {}

    class Splits(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            source = args[0] if args else None
            if isinstance(result, Tensor) and isinstance(source, Tensor) and id(source) in made:
                *leading, width = source.shape
                heads, size = result.shape[-2:] if result.dim() > 1 else (1, 1)
                if list(result.shape[:-2]) == leading and heads * size == width and heads > 1 and size > 1:
                    found[made[id(source)][0]] = heads
            return result

    def watch(layer: nn.Module) -> Any:
        return layer.register_forward_hook(lambda _, __, out: made.__setitem__(id(out), (layer, out)))

    handles = [watch(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad(), Splits():
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return found

"""Prune, n of m: in every m neighbouring weights of an output keep n.

Takes and gives a torch module. It needs training afterwards, which leaves the zeros alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

from .layers import check_finite
from .zeros import prunable, write

if TYPE_CHECKING:
    from torch import Tensor, nn


@register("prune/nm", takes="torch", gives="torch", needs_recovery=True)
@dataclass(kw_only=True)
class NM:
    """Keep the n largest of every m weights along the input channels (2:4, Mishra et al. 2021).

    This is the pattern that sparse tensor cores take; a dense kernel multiplies the zeros as it does any number.
    """

    n: int = 2  # weights kept
    m: int = 4  # of so many neighbours
    layers: list[str] = field(default_factory=list)  # module name patterns; empty means every layer with weights
    keep: list[str] = field(default_factory=list)  # module name patterns that are never touched

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"n is {self.n} and m is {self.m}; n must be at least 1 and below m")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        check_finite(model)
        weights = prunable(model, self.layers, self.keep)
        widths = {
            layer: [weight.shape[_inputs(model, layer)] for weight in named.values()]
            for layer, named in weights.items()
        }
        odd = {layer: width for layer, found in widths.items() for width in found if width % self.m}
        masks = {
            layer: {name: self._mask(weight, _inputs(model, layer)) for name, weight in named.items()}
            for layer, named in weights.items()
            if layer not in odd
        }
        if not masks:
            raise StageError(
                f"no layer has a number of inputs that is a multiple of m={self.m}: "
                + ", ".join(f"'{layer}' has {width}" for layer, width in list(odd.items())[:4])
            )
        write(model, masks, ctx)
        if odd:
            ctx.record(skipped=list(odd))
            said = ", ".join(f"'{layer}' ({width} inputs)" for layer, width in odd.items())
            ctx.note(f"left as they are, because m={self.m} does not divide their inputs: {said}")
        return model

    def _mask(self, weight: Tensor, axis: int) -> Tensor:
        """Where all but the n largest of each m neighbours along `axis` are."""
        import torch

        along = weight.detach().abs().movedim(axis, -1)
        fewest = along.reshape(-1, self.m).topk(self.m - self.n, largest=False).indices
        mask = torch.zeros(along.numel() // self.m, self.m, dtype=torch.bool).scatter_(1, fewest, True)
        return mask.view(along.shape).movedim(-1, axis)


def _inputs(model: nn.Module, layer: str) -> int:
    """The dimension of a layer's weights that its inputs run along."""
    return 0 if getattr(model.get_submodule(layer), "transposed", False) else 1

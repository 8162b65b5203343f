"""Prune, magnitude: set the smallest weights to zero.

Takes and gives a torch module. It needs training afterwards, which leaves the zeros alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

from .layers import Scope, check_finite
from .zeros import check_sparsity, least, prunable, write

if TYPE_CHECKING:
    from torch import nn


@register("prune/magnitude", takes="torch", gives="torch", needs_recovery=True)
@dataclass(kw_only=True)
class Magnitude:
    """Unstructured pruning by magnitude (Han et al. 2015): the weights with the least |w| become zero."""

    sparsity: float = 0.5  # share of the weights that become zero
    scope: Scope = Scope.layer
    layers: list[str] = field(default_factory=list)  # module name patterns; empty means every layer with weights
    keep: list[str] = field(default_factory=list)  # module name patterns that are never touched

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        check_finite(model)
        weights = prunable(model, self.layers, self.keep)
        scores = {
            layer: {name: weight.detach().abs() for name, weight in named.items()} for layer, named in weights.items()
        }
        write(model, least(scores, self.sparsity, self.scope), ctx)
        return model

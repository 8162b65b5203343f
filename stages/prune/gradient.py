"""Prune, gradient: set the weights to zero that the loss would miss least.

Takes and gives a torch module; reads training data. It needs training afterwards, which leaves the zeros alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

from .layers import Scope, check_finite
from .loss_gradients import check_batches, mean_gradients
from .zeros import check_sparsity, least, prunable, write

if TYPE_CHECKING:
    from torch import nn


@register("prune/gradient", takes="torch", gives="torch", needs_recovery=True)
@dataclass(kw_only=True)
class Gradient:
    """Unstructured pruning by |w · ∂loss/∂w|, what the loss loses to first order (Molchanov et al. 2017; 2019)."""

    sparsity: float = 0.5  # share of the weights that become zero
    scope: Scope = Scope.layer
    layers: list[str] = field(default_factory=list)  # module name patterns; empty means every layer with weights
    keep: list[str] = field(default_factory=list)  # module name patterns that are never touched
    batches: int = 8  # of training data that gradients are measured on

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_batches(self.batches)

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        check_finite(model)
        weights = prunable(model, self.layers, self.keep)
        gradients = mean_gradients(model, ctx, self.batches, power=1)
        scores = {
            layer: {name: weight.detach().abs() * gradients[weight] for name, weight in named.items()}
            for layer, named in weights.items()
        }
        write(model, least(scores, self.sparsity, self.scope), ctx)
        return model

"""A moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """A moving average of the weights (Polyak & Juditsky 1992); what is no weight, such as statistics, is not averaged.

    The decay of the first updates is lower, (1 + n) / (10 + n) after n, so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, weight in model.named_parameters():
            self.weights[name].lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the average in place of its weights."""
        weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self._put(self.weights, model)
        try:
            yield
        finally:
            self._put(weights, model)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor], model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates, "weights": self.weights}

    def restore(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, weight in state["weights"].items():
            self.weights[name].copy_(weight)

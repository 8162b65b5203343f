"""Task: the data that a model is judged on, the metric that judges it, and the inputs that trace it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optpipe.errors import StageError

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Batches = Iterable[tuple[Inputs, Any]]
Split = Literal["train", "validation", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How good one prediction is. A model's quality is the mean over a split.

    score: (outputs of a batch, its targets) -> one number per sample, shape (n,).
    """

    name: str
    score: Callable[[Any, Any], Tensor]
    higher_is_better: bool = True


def top1_accuracy() -> Metric:
    """The share of samples whose largest logit is the target class; outputs (n, classes), targets (n,)."""
    return Metric(name="accuracy", score=lambda outputs, target: (outputs.argmax(dim=1) == target).float())


@dataclass(kw_only=True)
class Task:
    """Data, metric and example inputs.

    Each split is iterated many times and yields (inputs, target) batches; inputs are a tensor, a tuple or a dict of
    tensors, samples along dimension 0. Whatever chooses during a run reads `validation`; `test` is read only to report.
    """

    train: Batches
    validation: Batches
    calibration: Batches
    test: Batches
    example_inputs: Inputs  # at least two samples: an example batch of one would be baked into the exported graph
    metric: Metric
    loss: Callable[[Any, Any], Tensor] = torch.nn.functional.cross_entropy  # of (outputs, target)
    fingerprint: str | None = None  # identifies the data; without it no result is shared between runs
    input_names: list[str] | None = None  # names in the exported graph; by default those of `forward`
    output_names: list[str] | None = None

    def evaluate(self, model: Callable[..., Any], split: Split) -> Tensor:
        """Per-sample scores of `model` on `split`, shape (n,), float64.

        Raises StageError if the split is empty or an output is not a finite number.
        """
        parts = [self._scores(model, batch, target, split) for batch, target in getattr(self, split)]
        if not parts:
            raise StageError(f"the {split} split is empty; it must hold at least one batch")
        return torch.cat(parts)

    def _scores(self, model: Callable[..., Any], inputs: Inputs, target: Any, split: Split) -> Tensor:
        with torch.no_grad():
            outputs = call(model, inputs)
        if not all(torch.isfinite(tensor).all() for tensor in tensors_in(outputs) if tensor.is_floating_point()):
            raise StageError(f"the model returns NaN or infinity on the {split} split; look at its weights and inputs")
        scores = self.metric.score(outputs, target).detach().to("cpu", torch.float64).flatten()
        if not torch.isfinite(scores).all():
            raise StageError(f"metric '{self.metric.name}' returned NaN or infinity on the {split} split")
        return scores


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """`model` on one batch: a tensor or tuple goes in by position, a dict by name."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """`inputs` as the (args, kwargs) that torch.export takes."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a tensor, tuple, list or dict, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`inputs` with `function` applied to every tensor."""
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def batch_of(inputs: Inputs, size: int) -> Inputs:
    """The first `size` samples of `inputs`, repeated from the start where there are fewer."""
    return map_tensors(lambda tensor: tensor[torch.arange(size) % len(tensor)], inputs)

"""Metrics: how good predictions are, sample by sample or over a whole split, and the common ones ready-made.

Of a model's outputs only the tensor that the metric reads is described here; a user's own metric takes whatever the
model returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Unit = Literal["fraction", "value"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How good a model is. Give exactly one of `score` and `compute`; raises ValueError otherwise.

    score: (outputs of a batch, its targets) -> one number per sample, shape (n,); the quality is the mean over a split.
    compute: (outputs of a split, its targets) -> one number. For what is no mean over samples, such as F1 or AUC. It is
        called some thousand times on resampled splits, which is how its interval is found; it may return NaN where it
        is undefined.
    unit: "fraction" is a share between 0 and 1, shown in per cent and points; "value" is any other number.
    each_class: (outputs of a split, its targets) -> one number per class, for the table of a `compute` metric; NaN
        where it is undefined.
    """

    name: str
    score: Callable[[Any, Any], Tensor] | None = None
    compute: Callable[[Any, Any], float | Tensor] | None = None
    higher_is_better: bool = True
    unit: Unit = "fraction"
    each_class: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.compute is None):
            raise ValueError(
                f"metric '{self.name}' has {'neither score nor compute' if self.score is None else 'score and compute'}"
                "; give exactly one: score=(outputs, target) -> one number per sample, or compute=(outputs, target) -> "
                "one number for a whole split"
            )
        if self.unit not in ("fraction", "value"):
            raise ValueError(f"unit of metric '{self.name}' is {self.unit!r}; it must be 'fraction' or 'value'")
        if self.each_class is not None and self.compute is None:
            raise ValueError(f"metric '{self.name}' has each_class beside score; it belongs to compute")


def top1_accuracy() -> Metric:
    """The share of samples whose largest logit is the target class; outputs (n, classes), targets (n,)."""
    return Metric(name="accuracy", score=lambda outputs, target: (outputs.argmax(dim=1) == target).float())


def multilabel_accuracy(threshold: float = 0.0, *, exact: bool = False) -> Metric:
    """The share of a sample's labels that are right; outputs and targets (n, labels), targets 0 or 1.

    A label is predicted where its output is above `threshold`: 0 suits logits, 0.5 probabilities.
    exact: a sample is right only if all its labels are (subset accuracy), else wrong.
    """

    def score(outputs: Tensor, target: Tensor) -> Tensor:
        _same_shape(outputs, target)
        right = (outputs > threshold) == target.bool()
        return right.all(dim=1).float() if exact else right.float().mean(dim=1)

    return Metric(name="exact_match" if exact else "label_accuracy", score=score)


def f1(threshold: float = 0.0) -> Metric:
    """Macro F1: the mean over classes of 2·TP / (2·TP + FP + FN), those left out that are neither target nor predicted.

    Outputs (n, classes) with targets (n,): the largest logit is predicted. Outputs of the targets' shape, (n, labels)
    or (n,), targets 0 or 1: predicted where above `threshold`, and a single label's F1 is that of the ones.
    """

    def compute(outputs: Tensor, target: Tensor) -> float:
        return float(_f1_of_classes(outputs, target, threshold).nanmean())

    def each_class(outputs: Tensor, target: Tensor) -> Tensor:
        return _f1_of_classes(outputs, target, threshold)

    return Metric(name="f1", compute=compute, each_class=each_class)


def mean_absolute_error() -> Metric:
    """Mean of |output - target|; both (n,) or (n, values), of which a sample's score is the mean. Lower is better."""
    return Metric(
        name="mae",
        score=lambda outputs, target: _errors(outputs, target).abs().mean(dim=1),
        higher_is_better=False,
        unit="value",
    )


def mean_squared_error() -> Metric:
    """Mean of (output - target)²; both (n,) or (n, values), of which a sample's score is the mean. Lower is better."""
    return Metric(
        name="mse",
        score=lambda outputs, target: _errors(outputs, target).square().mean(dim=1),
        higher_is_better=False,
        unit="value",
    )


def r2() -> Metric:
    """Coefficient of determination: 1 - Σ(output - target)² / Σ(target - mean)²; NaN where all targets are equal.

    Both (n,) or (n, values), of which the mean is taken.
    """

    def compute(outputs: Tensor, target: Tensor) -> float:
        wrong = _errors(outputs, target).square().sum(dim=0)
        columns = target.double().reshape(len(target), -1)
        spread = (columns - columns.mean(dim=0)).square().sum(dim=0)
        return float((1 - wrong / spread).mean()) if bool((spread > 0).all()) else float("nan")

    return Metric(name="r2", compute=compute, unit="value")


def _errors(outputs: Tensor, target: Tensor) -> Tensor:
    """Output - target as (n, values), float64; a trailing dimension of one is no difference of shape."""
    flat = outputs.double().reshape(len(outputs), -1), target.double().reshape(len(target), -1)
    _same_shape(*flat)
    return flat[0] - flat[1]


def _f1_of_classes(outputs: Tensor, target: Tensor, threshold: float) -> Tensor:
    """F1 of each class, NaN for one that is neither target nor predicted."""
    if outputs.dim() == 2 and target.dim() == 1 and outputs.shape[1] > 1:
        count = outputs.shape[1]
        predicted, true = outputs.argmax(dim=1), target.long()
        of_predicted = torch.bincount(predicted, minlength=count)
        of_true = torch.bincount(true, minlength=count)
        both = torch.bincount(true[predicted == true], minlength=count)
    else:
        chosen, wanted = (outputs > threshold).reshape(len(outputs), -1), target.bool().reshape(len(target), -1)
        _same_shape(chosen, wanted)
        of_predicted, of_true, both = chosen.sum(dim=0), wanted.sum(dim=0), (chosen & wanted).sum(dim=0)
    return 2 * both.double() / (of_predicted + of_true)  # 0 / 0 is NaN


def _same_shape(outputs: Tensor, target: Tensor) -> None:
    if outputs.shape != target.shape:  # broadcasting would make a figure out of it
        raise ValueError(f"outputs are {_words(outputs.shape)} and targets {_words(target.shape)}; shapes must agree")


def _words(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"

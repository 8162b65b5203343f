"""Predictions: what a model said on one split, and how its metric judges that."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optpipe.metrics import Metric

Scores = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """A model on one split, in the order that the split is read in; everything on the CPU.

    scores: per sample, shape (n,); None where the metric judges a whole split at once.
    outputs: of all samples; kept where the metric judges a whole split, and for the table per label, else None.
    targets: of all samples; kept with the outputs, and where they are classes.
    slices: the label of each sample in each slice that the task names.
    """

    metric: Metric
    n: int
    scores: Scores | None
    outputs: Any = None
    targets: Any = None
    slices: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def value(self) -> float:
        """The quality; NaN where the metric is undefined on these samples."""
        if self.scores is not None:
            return float(self.scores.mean()) if self.n else float("nan")
        return float(self._quiet(self.metric.compute, self.outputs, self.targets))

    def drop_from(self, baseline: Predictions) -> float:
        """The quality that was lost: positive where these are worse, whichever way the metric points."""
        lost = baseline.value - self.value
        return lost if self.metric.higher_is_better else -lost

    @property
    def classes(self) -> NDArray[np.int64] | None:
        """The class of each sample where targets are whole numbers of shape (n,), else None."""
        if not is_class(self.targets):
            return None
        classes: NDArray[np.int64] = self.targets.to(torch.int64).numpy()
        return classes

    @property
    def num_labels(self) -> int:
        """Number of labels that a sample may have at once; 0 where targets are something else."""
        return self.targets.shape[1] if has_labels(self.outputs, self.targets) else 0

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a file of them holds: `scores`, or `outputs` and `targets` where samples have none of their own."""
        if self.scores is not None:
            return {"scores": self.scores}
        return _named("outputs", self.outputs) | _named("targets", self.targets)

    def at(self, indices: Indices) -> Predictions:
        """Those samples only; one may occur several times."""
        return replace(
            self,
            n=len(indices),
            scores=None if self.scores is None else self.scores[indices],
            outputs=_select(self.outputs, indices),
            targets=_select(self.targets, indices),
            slices={},
        )

    def of_label(self, number: int) -> Predictions:
        """One label of all samples, judged alone. Raises what the metric raises if it cannot."""

        def of(value: Any) -> Any:
            return value[:, number : number + 1] if is_multilabel(value, self.targets) else value

        named, targets = isinstance(self.outputs, dict), of(self.targets)
        outputs = {name: of(part) for name, part in self.outputs.items()} if named else of(self.outputs)
        scores = None if self.metric.score is None else as_scores(self.metric.score(outputs, targets))
        return replace(self, outputs=outputs, targets=targets, scores=scores, slices={})

    def of_classes(self) -> Scores:
        """What a metric over the whole split says of each class; NaN where it is undefined."""
        return as_scores(torch.as_tensor(self._quiet(self.metric.each_class, self.outputs, self.targets)))

    def resampled(self, draws: Iterable[Indices]) -> Scores:
        """The value on each of the resampled splits; NaN where the metric is undefined or refuses to judge."""
        return np.array([self.at(indices)._value_or_nan() for indices in draws])

    def _value_or_nan(self) -> float:
        try:
            return self.value
        except Exception:  # the user's own metric, which did judge the whole split
            return float("nan")

    def _quiet(self, judge: Any, *arguments: Any) -> Any:
        """A judgement without the warnings of a metric that is undefined on some samples: NaN says it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return judge(*arguments)


def as_scores(scores: Tensor) -> Scores:
    """What a metric gave for a batch, as a flat float64 array."""
    array: Scores = torch.as_tensor(scores).detach().to("cpu", torch.float64).flatten().numpy()
    return array


def is_class(targets: Any) -> bool:
    """Whether `targets` are whole numbers of shape (n,)."""
    return (
        isinstance(targets, Tensor) and targets.dim() == 1 and not (targets.is_floating_point() or targets.is_complex())
    )


def is_multilabel(outputs: Any, targets: Any) -> bool:
    """Whether each sample has several labels of 0 or 1, and an output for each."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and targets.dim() == 2
        and targets.shape[1] > 1
        and targets.shape == outputs.shape
        and bool(((targets == 0) | (targets == 1)).all())
    )


def has_labels(outputs: Any, targets: Any) -> bool:
    """Whether `is_multilabel` holds for the outputs, or for one of several that have names."""
    parts = outputs.values() if isinstance(outputs, dict) else [outputs]
    return any(is_multilabel(part, targets) for part in parts)


def join(parts: list[Any]) -> Any:
    """Batches one after the other: tensors along dimension 0, in tuples, lists and dicts; other lists item by item.

    Raises TypeError for anything else.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part.detach().cpu() for part in parts])
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.concatenate(parts))
    if isinstance(first, dict):
        return {name: join([part[name] for part in parts]) for name in first}
    if isinstance(first, (tuple, list)) and first and all(isinstance(item, (Tensor, np.ndarray)) for item in first):
        return tuple(join(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, (tuple, list)):
        return list(itertools.chain(*parts))
    raise TypeError(
        f"batches of {type(first).__name__} cannot be joined; give a tensor, or a tuple, list or dict of them"
    )


def _select(value: Any, indices: Indices) -> Any:
    """The samples `indices` of what `join` gave."""
    if isinstance(value, Tensor):
        return value[torch.from_numpy(indices)]
    if isinstance(value, dict):
        return {name: _select(item, indices) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_select(item, indices) for item in value)
    return None if value is None else [value[index] for index in indices]


def _named(name: str, value: Any) -> dict[str, NDArray[Any]]:
    """The arrays of what `join` gave, with the way to each in its name."""
    if isinstance(value, Tensor):
        return {name: value.numpy()}
    if isinstance(value, (dict, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: array for part, item in items for key, array in _named(f"{name}.{part}", item).items()}
    return {name: np.array([str(item) for item in value])}

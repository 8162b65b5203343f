"""Task: the data that a model is judged on, the metric that judges it, and the inputs that trace it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from optpipe.errors import StageError
from optpipe.metrics import Metric as Metric
from optpipe.metrics import top1_accuracy as top1_accuracy
from optpipe.predictions import Predictions, Scores, as_scores, has_labels, is_class, join

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Batches = Iterable[tuple[Inputs, Any]]
Split = Literal["train", "validation", "calibration", "test"]
Slice = Callable[[Any, Any], Sequence[Any] | Tensor]  # (inputs of a batch, its target) -> a label per sample
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")


class SliceError(ValueError):
    """A slice does not give one label per sample."""


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
    outputs: list[str] = field(default_factory=list)  # those that matter, where the model returns more; see `selected`
    input_names: list[str] | None = None  # names in the exported graph; by default those of `forward`
    output_names: list[str] | None = None  # by default `outputs`
    preprocess: nn.Module | None = None  # from what the splits yield to what the model takes; part of every model
    postprocess: nn.Module | None = None  # from what it returns to what metric and loss take; likewise
    class_names: list[str] | None = None  # of the classes, or of the labels of a multi-label target
    slices: dict[str, Slice] = field(default_factory=dict)  # quality is also told for each of their labels

    def __post_init__(self) -> None:
        if not isinstance(self.metric, Metric):
            raise TypeError(
                f"metric is {self.metric!r}; it must be an optpipe.Metric, for example optpipe.metrics.top1_accuracy()"
            )
        if self.outputs and self.output_names is None:
            self.output_names = [name.replace(".", "_") for name in self.outputs]

    def selected(self, value: Any) -> Any:
        """What of a model's return `value` the metric, the loss and parity see.

        All of it if the task names no outputs; else the tensor with that name, or a dict of several. A name is the way
        to a tensor through dicts, sequences and dataclasses, as in "heads.scores", or the end of that way where it is
        the only one. A value that names nothing, a tensor or a tuple, holds them in their order.
        Raises StageError if an output is missing or its name stands for several.
        """
        if not self.outputs:
            return value
        found = [tensor for _, tensor in select(value, self.outputs)]
        return found[0] if len(found) == 1 else dict(zip(self.outputs, found, strict=True))

    def processed(self, model: nn.Module) -> nn.Module:
        """`model` between the task's own pre- and post-processing, so that both are in every graph made of it."""
        if self.preprocess is None and self.postprocess is None:
            return model
        return Processed(self.preprocess or nn.Identity(), model, self.postprocess or nn.Identity())

    def evaluate(self, model: Callable[..., Any], split: Split) -> Tensor:
        """Scores of `model` on `split` whose mean is its quality, float64.

        One per sample, shape (n,); a metric over the whole split gives one, shape (1,). Raises as `predict` does.
        """
        predictions = self.predict(model, split)
        return torch.from_numpy(np.array([predictions.value]) if predictions.scores is None else predictions.scores)

    def predict(self, model: Callable[..., Any], split: Split) -> Predictions:
        """What `model` says on `split`, judged.

        Raises StageError if the split is empty, an output is not a finite number, the metric gives NaN or refuses, or
        a slice does not label every sample.
        """
        batches = [self._batch(model, inputs, target, split) for inputs, target in getattr(self, split)]
        if not batches:
            raise StageError(f"the {split} split is empty; it must hold at least one batch")
        try:
            predictions = self._joined(batches)
            value = predictions.value
        except Exception as error:  # the user's own metric
            raise self._refusal(split, error) from error
        if not math.isfinite(value):
            raise StageError(f"metric '{self.metric.name}' is {value} on the {split} split{_why(predictions)}")
        return predictions

    def slice_labels(self, inputs: Inputs, target: Any) -> dict[str, list[str]]:
        """The label of each sample of a batch in each slice. Raises SliceError where one fails to label each."""
        size = size_of(inputs)
        found = {}
        for name, label in self.slices.items():
            try:
                labels = label(inputs, target)
                found[name] = [str(item) for item in (labels.tolist() if hasattr(labels, "tolist") else labels)]
            except Exception as error:  # the user's own function
                raise SliceError(f"slice '{name}' raised {type(error).__name__}: {error}") from error
            if len(found[name]) != size:
                raise SliceError(f"slice '{name}' gave {len(found[name])} labels for {size} samples; give one for each")
        return found

    def _batch(self, model: Callable[..., Any], inputs: Inputs, target: Any, split: Split) -> Predictions:
        """One batch; outputs and targets only as far as they are needed later."""
        with torch.no_grad():
            outputs = self.selected(call(model, inputs))
        if not all(torch.isfinite(tensor).all() for tensor in tensors_in(outputs) if tensor.is_floating_point()):
            raise StageError(f"the model returns NaN or infinity on the {split} split; look at its weights and inputs")
        size, whole = size_of(inputs), self.metric.score is None or has_labels(outputs, target)
        try:
            return Predictions(
                metric=self.metric,
                n=size,
                scores=self._scores(outputs, target, size, split),
                outputs=join([outputs]) if whole else None,
                targets=join([target]) if whole or is_class(target) else None,
                slices=self.slice_labels(inputs, target),
            )
        except TypeError as error:
            raise self._refusal(split, error) from error
        except SliceError as error:
            raise StageError(f"{error} ({split} split)") from error

    def _scores(self, outputs: Any, target: Any, size: int, split: Split) -> Scores | None:
        if self.metric.score is None:
            return None
        try:
            scores = as_scores(self.metric.score(outputs, target))
        except Exception as error:  # the user's own metric
            raise self._refusal(split, error) from error
        if not np.isfinite(scores).all():
            raise StageError(f"metric '{self.metric.name}' returned NaN or infinity on the {split} split")
        if len(scores) != size:
            raise StageError(
                f"metric '{self.metric.name}' gave {len(scores)} scores for {size} samples of the {split} split"
            )
        return scores

    def _joined(self, batches: list[Predictions]) -> Predictions:
        """One split of its batches; what not every batch has is left out."""
        parts: dict[str, list[Any]] = {
            name: [getattr(batch, name) for batch in batches] for name in ("scores", "outputs", "targets")
        }
        kept = {name: all(part is not None for part in values) for name, values in parts.items()}
        return Predictions(
            metric=self.metric,
            n=sum(batch.n for batch in batches),
            scores=np.concatenate(parts["scores"]) if kept["scores"] else None,
            outputs=join(parts["outputs"]) if kept["outputs"] else None,
            targets=join(parts["targets"]) if kept["targets"] else None,
            slices={name: [label for batch in batches for label in batch.slices[name]] for name in self.slices},
        )

    def _refusal(self, split: Split, error: Exception) -> StageError:
        return StageError(
            f"metric '{self.metric.name}' cannot judge the {split} split ({type(error).__name__}: {error})"
        )


class Processed(nn.Module):
    """A model between the processing of what comes in and of what goes out."""

    def __init__(self, preprocess: nn.Module, model: nn.Module, postprocess: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.model, self.postprocess = preprocess, model, postprocess

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.postprocess(call(self.model, self.preprocess(*args, **kwargs)))


def _why(predictions: Predictions) -> str:
    """A likely reason of a metric that is undefined."""
    classes = predictions.classes
    if classes is None or len(np.unique(classes)) > 1:
        return f", {predictions.n} samples; it must be a finite number"
    return f", where only class {classes[0]} occurs; give samples of other classes"


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


def parts_of(value: Any) -> list[tuple[str, Any]] | None:
    """The parts of a dict, sequence or dataclass with their names; None for what has none."""
    if isinstance(value, Mapping):
        return [(str(name), part) for name, part in value.items()]
    if isinstance(value, (tuple, list)):
        return [(str(i), part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def leaves(value: Any, way: str = "") -> Iterator[tuple[str, Any]]:
    """What is no dict, sequence or dataclass in one of these, with the way to it, empty for a lone one."""
    parts = parts_of(value)
    if parts is None:
        yield way, value
    for name, part in parts or ():
        yield from leaves(part, f"{way}.{name}" if way else name)


def named_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors among `leaves`."""
    return ((way, leaf) for way, leaf in leaves(value) if isinstance(leaf, Tensor))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a tensor, sequence, dict or dataclass, in order."""
    return [tensor for _, tensor in named_tensors(value)]


def select(value: Any, names: Sequence[str]) -> list[tuple[str, Tensor]]:
    """The tensors in `value` called `names`, each with the way to it; found, and refused, as `Task.selected` says."""
    tensors = dict(named_tensors(value))
    if isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and len(tensors) == len(value)):
        if len(tensors) != len(names):
            raise StageError(f"the model returns {len(tensors)} tensor(s) for the outputs {', '.join(names)}")
        return list(tensors.items())
    found = []
    for name in names:
        ways = [way for way in tensors if way == name] or [way for way in tensors if way.endswith(f".{name}")]
        if len(ways) != 1:
            said = f"{name!r} stands for {', '.join(ways)}" if ways else f"there is no tensor {name!r}"
            raise StageError(f"of the outputs {said}; the model returns {', '.join(tensors) or 'no tensor'}")
        found.append((ways[0], tensors[ways[0]]))
    return found


def size_of(inputs: Inputs) -> int:
    """Number of samples in a batch."""
    return len(tensors_in(inputs)[0])


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`inputs` with `function` applied to every tensor."""
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def batch_of(inputs: Inputs, size: int) -> Inputs:
    """The first `size` samples of `inputs`, repeated from the start where there are fewer."""
    return map_tensors(lambda tensor: tensor[torch.arange(size) % len(tensor)], inputs)

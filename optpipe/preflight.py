"""What can be wrong with a model and a task together, found before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from optpipe.budget import Budget
from optpipe.errors import RecipeError, StageError, named_reason
from optpipe.forms import SPOKEN, form_of
from optpipe.measure.proportions import samples_needed, smallest_provable_drop
from optpipe.predictions import Predictions, as_scores, is_class, is_multilabel, join
from optpipe.task import SPLITS, SliceError, Task, call, tensors_in


def check(model: Any, task: Any, budget: Budget, subject: str, expected: str = "torch") -> None:
    """Raise RecipeError with every problem of `model` and `task`, and with limits that the task cannot decide."""
    problems = []
    found = form_of(model)
    if found is None or found.NAME != expected:
        returned = type(model).__name__ if found is None else SPOKEN[found.NAME]
        problems.append(f"model: the factory returned {returned}; it must return {SPOKEN[expected]}")
    if not isinstance(task, Task):
        problems.append(f"data: the factory returned {type(task).__name__}; it must return an optpipe.Task")
    if isinstance(task, Task) and not isinstance(model, nn.Module) and (task.preprocess or task.postprocess):
        problems.append("data: the task has processing of its own, which a model that starts as a file cannot be given")
    if problems:
        raise RecipeError(problems, subject)
    problems = _task_problems(task) + (_weight_problems(model) if isinstance(model, nn.Module) else [])
    if not problems:
        problems = _call_problems(_callable(model), task) + _confidence_problems(task, budget)
    if problems:
        raise RecipeError(problems, subject)


def _callable(model: Any) -> Callable[..., Any]:
    """`model` as what evaluates it; a file is opened here for the first time."""
    found = form_of(model)
    assert found is not None
    try:
        return found.as_callable(model)
    except Exception as error:  # of the engine that opens it
        raise RecipeError([f"model: it cannot be opened ({named_reason(error)})"], "the model") from error


def _confidence_problems(task: Task, budget: Budget) -> list[str]:
    """Limits on quality that this many validation samples could not show to hold even if not one of them flipped."""
    limits = [one.quality_drop for one in (budget, *budget.stages.values()) if one.quality_drop is not None]
    if not limits or budget.confidence <= 0.5 or task.metric.score is None:
        return []
    _, target = next(iter(task.validation))
    binary = task.metric.unit == "fraction" and is_class(target)
    n = sum(len(tensors_in(inputs)[0]) for inputs, _ in task.validation)
    least = smallest_provable_drop(n, budget.confidence, binary)
    if min(limits) >= least:
        return []
    remedy = f"raise the limit to {least:.4f}" if least < 1 else "raise the limit"
    if min(limits) > 0:
        remedy = f"give at least {samples_needed(min(limits), budget.confidence)} samples, {remedy}"
    return [
        f"budget.quality_drop={min(limits):g} at confidence={budget.confidence:g} cannot be shown to hold with {n} "
        f"validation samples, even if none flips; {remedy}, or lower budget.confidence"
    ]


def _task_problems(task: Task) -> list[str]:
    problems = []
    for split in SPLITS:
        try:
            first = next(iter(getattr(task, split)), None)
        except Exception as error:  # the user's own loading code: whatever it raises is theirs to read
            problems.append(f"data: reading the {split} split failed ({type(error).__name__}: {error})")
            continue
        if first is None:
            problems.append(f"data: the {split} split is empty; it must hold at least one batch")
        elif not (isinstance(first, (tuple, list)) and len(first) == 2):
            problems.append(f"data: the {split} split yields {type(first).__name__}; it must yield (inputs, target)")
        elif any(len(tensor) == 0 for tensor in tensors_in(first[0])):
            problems.append(f"data: the {split} split starts with an empty batch; it must hold at least one sample")
        elif split in ("validation", "test") and not _starts_with(getattr(task, split), first):
            problems.append(
                f"data: the {split} split starts with other samples when it is read again; models are compared sample "
                "by sample, so give it unshuffled, without random augmentation, as what can be read many times"
            )
    examples = tensors_in(task.example_inputs)
    if not examples:
        problems.append("data: example_inputs holds no tensor; it must be a tensor, a tuple or a dict of tensors")
    return problems


def _weight_problems(model: nn.Module) -> list[str]:
    broken = [name for name, t in model.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]
    if not broken:
        return []
    named = ", ".join(f"'{name}'" for name in broken[:3])
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return [f"model: NaN or infinity in {named}{more}; give weights of a model that was trained to the end"]


def _call_problems(model: Callable[..., Any], task: Task) -> list[str]:
    """Run the model once on the example inputs and judge one batch of the test split."""
    inputs, target = next(iter(task.test))
    problems = []
    for what, batch in (("example_inputs", task.example_inputs), ("the inputs of the test split", inputs)):
        shapes = [tuple(tensor.shape) for tensor in tensors_in(batch)]
        try:
            with torch.no_grad():
                outputs = task.selected(call(model, batch))
        except StageError as error:
            problems.append(f"data: {error}")
            continue
        except Exception as error:  # the user's own forward: whatever it raises is theirs to read
            reason = str(error).strip().splitlines()
            problems.append(
                f"model: it does not accept {what}, shapes {shapes} ({type(error).__name__}: {' '.join(reason[:2])})"
            )
            continue
        if not all(tensor.isfinite().all() for tensor in tensors_in(outputs) if tensor.is_floating_point()):
            problems.append(f"model: it returns NaN or infinity on {what}; look at its weights and the data's scaling")
    if problems:
        return problems
    return _metric_problems(model, task, outputs, inputs, target) + _group_problems(task, inputs, target)


def _metric_problems(model: Callable[..., Any], task: Task, outputs: Any, inputs: Any, target: Any) -> list[str]:
    """Judge the first batch of the test split; all of it where a metric over a whole split is undefined there."""
    metric, size = task.metric, len(tensors_in(inputs)[0])
    shapes = f"outputs {_shapes(outputs)}, targets {_shapes(target)}"
    try:
        if metric.score is not None:
            values = as_scores(metric.score(outputs, target))
        else:
            whole = Predictions(metric=metric, n=size, scores=None, outputs=join([outputs]), targets=join([target]))
            values = np.array([whole.value])
    except Exception as error:  # the user's own metric
        return [f"data: metric '{metric.name}' cannot judge {shapes} ({type(error).__name__}: {error})"]
    if metric.score is not None and len(values) != size:
        return [
            f"data: metric '{metric.name}' gave {len(values)} scores for {size} samples, {shapes}; it must give one "
            "per sample, or be compute= instead of score= if it judges a whole split"
        ]
    if not np.isfinite(values).all():
        return _undefined(model, task, shapes)
    if metric.unit == "fraction" and (values.min() < 0 or values.max() > 1):
        odd = values[(values < 0) | (values > 1)][0]
        return [f"data: metric '{metric.name}' gave {odd:.4g}, no share between 0 and 1; make it with unit='value'"]
    return []


def _undefined(model: Callable[..., Any], task: Task, shapes: str) -> list[str]:
    """A metric over a whole split may be undefined on one batch of it, but not on all."""
    if task.metric.score is not None:
        return [f"data: metric '{task.metric.name}' gives NaN or infinity for {shapes}; each score must be finite"]
    problems = []
    for split in ("test", "validation"):
        try:
            task.predict(model, split)  # type: ignore[arg-type]
        except StageError as error:
            problems.append(f"data: {error}")
    return problems


def _group_problems(task: Task, inputs: Any, target: Any) -> list[str]:
    """Slices and names of classes that do not fit the first batch of the test split."""
    problems = []
    try:
        task.slice_labels(inputs, target)
    except SliceError as error:
        problems.append(f"data: {error}")
    if task.class_names is not None:
        names = len(task.class_names)
        if is_class(target) and int(target.max()) >= names:
            problems.append(
                f"data: class_names holds {names} names, but class {int(target.max())} occurs in the test split"
            )
        elif is_multilabel(target, target) and target.shape[1] != names:
            problems.append(f"data: class_names holds {names} names for {target.shape[1]} labels; give one for each")
    return problems


def _starts_with(split: Any, first: Any) -> bool:
    """Whether a split that is read again starts with the same samples, on which paired differences rest."""
    again = next(iter(split), None)
    if again is None:
        return False
    return all(map(torch.equal, tensors_in(first[0]), tensors_in(again[0])))


def _shapes(value: Any) -> str:
    """Shape and type of each tensor, or the kind of thing where there is none."""
    tensors = tensors_in(value)
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in tensors) if tensors else type(value).__name__

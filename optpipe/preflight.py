"""What can be wrong with a model and a task together, found before the first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optpipe.errors import RecipeError
from optpipe.task import SPLITS, Task, call, tensors_in


def check(model: Any, task: Any, subject: str) -> None:
    """Raise RecipeError with every problem of `model` and `task`."""
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(f"model: the factory returned {type(model).__name__}; it must return a torch.nn.Module")
    if not isinstance(task, Task):
        problems.append(f"data: the factory returned {type(task).__name__}; it must return an optpipe.Task")
    if problems:
        raise RecipeError(problems, subject)
    problems = _task_problems(task) + _weight_problems(model)
    if not problems:
        problems = _call_problems(model, task)
    if problems:
        raise RecipeError(problems, subject)


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


def _call_problems(model: nn.Module, task: Task) -> list[str]:
    """Run the model once on the example inputs and judge one batch of the test split."""
    inputs, target = next(iter(task.test))
    problems = []
    for what, batch in (("example_inputs", task.example_inputs), ("the inputs of the test split", inputs)):
        shapes = [tuple(tensor.shape) for tensor in tensors_in(batch)]
        try:
            with torch.no_grad():
                outputs = call(model.eval(), batch)
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
    try:
        scores = task.metric.score(outputs, target)
    except Exception as error:  # the user's own metric
        return [f"data: metric '{task.metric.name}' cannot judge the outputs ({type(error).__name__}: {error})"]
    if scores.numel() != len(target):
        return [
            f"data: metric '{task.metric.name}' gave {scores.numel()} scores for {len(target)} samples; "
            "it must give one per sample"
        ]
    return []

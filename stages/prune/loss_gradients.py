"""Gradients: what the task's loss says of every weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let every parameter have a gradient, and then only those of them that may be trained."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():  # a pruner makes new ones
            parameter.requires_grad_(name not in frozen)
            parameter.grad = None


def mean_gradients(model: nn.Module, ctx: Context, batches: int, power: int) -> dict[nn.Parameter, Tensor]:
    """The mean of |∂loss/∂w|^power over the first `batches` batches of training data, for every parameter.

    Of absolute values, because the gradients of a trained model cancel out: their plain mean is about 0. Raises
    StageError if there is no training data, or a gradient is not a finite number.
    """
    import torch

    from optpipe.task import call

    model.eval()
    sums = {parameter: torch.zeros_like(parameter.data) for parameter in model.parameters()}
    seen = 0
    with differentiable(model):
        for inputs, target in ctx.progress(ctx.task.train, "measuring gradients", total=batches):
            model.zero_grad()
            ctx.task.loss(ctx.task.selected(call(model, inputs)), target).backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                if parameter.grad is None:  # the outputs do not depend on it
                    continue
                if not torch.isfinite(parameter.grad).all():
                    raise StageError(
                        f"the gradient of '{name}' is NaN or infinite; look at the loss and the training data"
                    )
                sums[parameter] += parameter.grad.abs() ** power
            seen += 1
            if seen == batches:
                break
    if not seen:
        raise StageError("the train split is empty; it must hold at least one batch to measure gradients on")
    return {parameter: total / seen for parameter, total in sums.items()}


def check_batches(batches: int) -> None:
    if batches < 1:
        raise ValueError(f"batches is {batches}; it must be at least 1")

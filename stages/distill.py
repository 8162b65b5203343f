"""Distill: train the current model, to answer as the baseline does or as the labels say.

Takes and gives a torch module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


class Training(Protocol):
    """The settings that every stage of this family has."""

    epochs: int
    learning_rate: float
    weight_decay: float
    held_out: float
    patience: int


@register("distill/logits", takes="torch", gives="torch", requires=("lightning_fabric",))
@dataclass(kw_only=True)
class Logits:
    """Match the baseline's softened class probabilities as well as the labels (Hinton et al. 2015).

    loss = alpha · T² · KL(teacher/T ‖ student/T) + (1 - alpha) · task loss. Which epoch is kept is decided on a slice
    of the training data; validation and test data are not seen.
    """

    epochs: int = 10
    learning_rate: float = 3e-3
    temperature: float = 4.0  # T: the higher, the more the small probabilities count
    alpha: float = 0.7  # weight of the teacher against the labels
    weight_decay: float = 0.01
    held_out: float = 0.1  # share of the training data that picks the best epoch
    patience: int = 0  # stop after so many epochs without a better one; 0 trains them all

    def __post_init__(self) -> None:
        _check(self)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import copy

        import torch

        from optpipe.task import call

        teacher = ctx.fabric.to_device(copy.deepcopy(ctx.baseline).eval())
        teacher.to(memory_format=torch.channels_last)  # convolutions alone; a third less time on a CPU
        _check_outputs_fit(model, teacher, ctx)

        def loss(inputs: Any, student: Tensor, target: Any) -> Tensor:
            with torch.no_grad():
                wanted = call(teacher, inputs)
            return self.loss(student, wanted, ctx.task.loss(student, target))

        return _train(model, self, loss, ctx, "distilling")

    def loss(self, student: Tensor, teacher: Tensor, task_loss: Tensor) -> Tensor:
        """The distillation loss; `student` and `teacher` are logits of shape (n, classes)."""
        from torch.nn import functional as F

        t = self.temperature
        soft = F.kl_div(
            F.log_softmax(student / t, 1), F.log_softmax(teacher / t, 1), reduction="batchmean", log_target=True
        )
        return self.alpha * t * t * soft + (1 - self.alpha) * task_loss


@register("distill/finetune", takes="torch", gives="torch", requires=("lightning_fabric",))
@dataclass(kw_only=True)
class Finetune:
    """Minimise the task's own loss, without a teacher: for outputs of any kind, and as the yardstick of distillation.

    Which epoch is kept is decided on a slice of the training data; validation and test data are not seen.
    """

    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    held_out: float = 0.1  # share of the training data that picks the best epoch
    patience: int = 0  # stop after so many epochs without a better one; 0 trains them all

    def __post_init__(self) -> None:
        _check(self)

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        return _train(model, self, lambda _, outputs, target: ctx.task.loss(outputs, target), ctx, "fine-tuning")


def _check(settings: Training) -> None:
    if settings.epochs < 1:
        raise ValueError(f"epochs is {settings.epochs}; it must be at least 1")
    if not 0 < settings.held_out < 1:
        raise ValueError(f"held_out is {settings.held_out}; it must be above 0 and below 1")
    if settings.learning_rate <= 0:
        raise ValueError(f"learning_rate is {settings.learning_rate}; it must be above 0")
    if settings.patience < 0:
        raise ValueError(f"patience is {settings.patience}; it must not be negative")


def _train(
    model: nn.Module, settings: Training, loss: Callable[[Any, Any, Any], Tensor], ctx: Context, description: str
) -> nn.Module:
    """Train `model` on all but a slice of the training data, and keep the epoch whose loss on that slice is least."""
    import torch

    from optpipe.task import call
    from optpipe.training import Schedule, fit, hold_out

    train, held = hold_out(ctx.task.train, settings.held_out, ctx.seed)

    def judge(student: nn.Module) -> float:
        with torch.no_grad():
            losses = [loss(inputs, call(student, inputs), target) for inputs, target in map(ctx.fabric.to_device, held)]
        return -float(torch.stack(losses).mean())

    schedule = Schedule(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        patience=settings.patience,
    )
    history = fit(model, train, loss, schedule, fabric=ctx.fabric, judge=judge, description=description)
    ctx.record(epochs=len(history.losses), best_epoch=history.best_epoch, losses=history.losses)
    ctx.note(f"kept epoch {history.best_epoch} of {len(history.losses)}, the best on held-out training data")
    return model


def _check_outputs_fit(student: nn.Module, teacher: nn.Module, ctx: Context) -> None:
    import torch

    from optpipe.task import call, tensors_in

    with torch.no_grad():
        shapes = [
            [
                tuple(tensor.shape)
                for tensor in tensors_in(call(model.eval(), ctx.fabric.to_device(ctx.task.example_inputs)))
            ]
            for model in (ctx.fabric.to_device(student), teacher)
        ]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or len(shapes[0][0]) != 2:
        raise StageError(
            f"distill/logits needs logits of shape (n, classes) from both; the student gives {shapes[0]} "
            f"and the teacher {shapes[1]}"
        )

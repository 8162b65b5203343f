"""Distill: train the current model to answer as the baseline does.

Takes and gives a torch module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be above 0 and below 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import copy

        import torch

        from optpipe.task import call
        from optpipe.training import Schedule, fit, hold_out

        teacher = ctx.fabric.to_device(copy.deepcopy(ctx.baseline).eval())
        teacher.to(memory_format=torch.channels_last)  # convolutions alone; a third less time on a CPU
        _check_outputs_fit(model, teacher, ctx)

        def loss(inputs: Any, student: Tensor, target: Any) -> Tensor:
            with torch.no_grad():
                wanted = call(teacher, inputs)
            return self.loss(student, wanted, ctx.task.loss(student, target))

        def judge(student: nn.Module) -> float:
            """How close the student is to its training target on the held-out slice, higher is better."""
            with torch.no_grad():
                losses = [loss(inputs, call(student, inputs), y) for inputs, y in map(ctx.fabric.to_device, held)]
            return -float(torch.stack(losses).mean())

        train, held = hold_out(ctx.task.train, self.held_out, ctx.seed)
        schedule = Schedule(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            patience=self.patience,
        )
        history = fit(model, train, loss, schedule, fabric=ctx.fabric, judge=judge, description="distilling")
        ctx.record(epochs=len(history.losses), best_epoch=history.best_epoch, losses=history.losses)
        ctx.note(f"kept epoch {history.best_epoch} of {len(history.losses)}, the best on held-out training data")
        return model

    def loss(self, student: Tensor, teacher: Tensor, task_loss: Tensor) -> Tensor:
        """The distillation loss; `student` and `teacher` are logits of shape (n, classes)."""
        from torch.nn import functional as F

        t = self.temperature
        soft = F.kl_div(
            F.log_softmax(student / t, 1), F.log_softmax(teacher / t, 1), reduction="batchmean", log_target=True
        )
        return self.alpha * t * t * soft + (1 - self.alpha) * task_loss


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

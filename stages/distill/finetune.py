"""Distill, finetune: train a model on the labels alone.

Takes and gives a torch module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

from .settings import Learning

if TYPE_CHECKING:
    from torch import nn


@register("distill/finetune", takes="torch", gives="torch", requires=("lightning_fabric",))
@dataclass(kw_only=True)
class Finetune(Learning):
    """Minimise the task's own loss, without a teacher: the yardstick of distillation.

    Which epoch is kept is decided on a slice of the training data; validation and test data are not seen.
    """

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from .student import learn, student_of

        student, task = student_of(model, self, ctx), ctx.task
        learn(student, lambda _, outputs, target: task.loss(task.selected(outputs), target), self, ctx, "fine-tuning")
        return student

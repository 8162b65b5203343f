"""Distill, logits: train a model to answer as the baseline does.

Takes and gives a torch module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

from .settings import Imitating

if TYPE_CHECKING:
    from torch import nn


@register("distill/logits", takes="torch", gives="torch", requires=("lightning_fabric",))
@dataclass(kw_only=True)
class Logits(Imitating):
    """Match the baseline's softened answers as well as the labels (Hinton et al. 2015).

    loss = alpha · T² · KL(teacher/T ‖ student/T) + (1 - alpha) · task loss, for classes; for several labels at once
    and for numbers see `optpipe.imitation`. Which epoch is kept is decided on a slice of the training data; validation
    and test data are not seen.
    """

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from optpipe.imitation import imitation, teacher_of

        from .student import learn, student_of

        student = student_of(model, self, ctx)
        loss = imitation(teacher_of(ctx), ctx.task, alpha=self.alpha, temperature=self.temperature)
        learn(student, loss, self, ctx, "distilling", alpha=str(self.alpha), temperature=str(self.temperature))
        ctx.record(outputs=loss.describe())
        return student

"""Distill, features: train a model to answer as the baseline does, and to see what it sees on the way.

Takes and gives a torch module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError, did_you_mean
from optpipe.registry import register

from .settings import Imitating

if TYPE_CHECKING:
    from torch import nn

    from .hints import Shapes


@register("distill/features", takes="torch", gives="torch", requires=("lightning_fabric",))
@dataclass(kw_only=True)
class Features(Imitating):
    """Match outputs of layers within the baseline, its hints, beside its answers (FitNets, Romero et al. 2015).

    loss = loss of distill/logits + hint_weight · sum over the hints of the squared distance between the features of
    student and teacher, each scaled to length 1 per sample. Where their widths differ, a linear projection (of a
    convolution's channels: a 1×1 convolution) maps the student's to the teacher's; it is trained along and thrown away.
    """

    hints: dict[str, str] = field(default_factory=dict)  # student's layer: teacher's; without, the middle one of both
    hint_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint_weight <= 0:
            raise ValueError(f"hint_weight is {self.hint_weight}; it must be above 0, or use distill/logits")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from dataclasses import replace

        from optpipe.imitation import imitation

        from .hints import HintedLoss, Watched, outputs_of_layers, projection
        from .student import learn, student_of, teacher_of

        student, teacher = student_of(model, self, ctx), teacher_of(ctx)
        seen, wanted = outputs_of_layers(student, ctx.task), outputs_of_layers(teacher, ctx.task)
        hints = self._hints(seen, wanted)
        projections = [projection(name, seen[name], of, wanted[of]) for name, of in hints.items()]
        learner, guide = Watched(student, list(hints), projections), Watched(teacher, list(hints.values()))
        answers = imitation(teacher, ctx.task, alpha=self.alpha, temperature=self.temperature)
        loss = HintedLoss(answers, guide, self.hint_weight)
        inside = replace(self, checkpointing=[f"model.{pattern}" for pattern in self.checkpointing])
        of = {name: str(getattr(self, name)) for name in ("alpha", "temperature", "hint_weight")}
        learn(learner, loss, inside, ctx, "distilling with hints", hints=str(hints), **of)
        learner.release()
        ctx.record(outputs=answers.describe(), hints=[f"{name} <- {of}" for name, of in hints.items()])
        ctx.note(f"hints: {', '.join(f'{name} learns from {of}' for name, of in hints.items())}")
        return student

    def _hints(self, student: Shapes, teacher: Shapes) -> dict[str, str]:
        """The layers to compare; the middle one that both have, as in the paper, where the settings name none."""
        for whose, layers, names in (("student", student, self.hints), ("teacher", teacher, self.hints.values())):
            for name in names:
                if name not in layers:
                    hint = did_you_mean(name, layers) or f"; it has, for example, {list(layers)[:3]}"
                    raise StageError(
                        f"hints names '{name}', which is no layer of the {whose} that gives a tensor{hint}"
                    )
        common = [name for name in student if name in teacher]
        if not (self.hints or common):
            raise StageError(
                f"student and teacher have no layer of the same name; give hints, for example "
                f"{{{next(iter(student), 'layer')}: {next(iter(teacher), 'layer')}}}"
            )
        return self.hints or {common[len(common) // 2]: common[len(common) // 2]}

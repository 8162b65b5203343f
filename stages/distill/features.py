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

    hints: list[str] = field(default_factory=list)  # layers of the student; without, the middle block that both have
    teacher_hints: list[str] = field(default_factory=list)  # what each of them learns from; without, its namesake
    hint_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint_weight <= 0:
            raise ValueError(f"hint_weight is {self.hint_weight}; it must be above 0, or use distill/logits")
        if self.teacher_hints and len(self.teacher_hints) != len(self.hints):
            raise ValueError(
                f"hints names {len(self.hints)} layers and teacher_hints {len(self.teacher_hints)}; give one for each"
            )

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from dataclasses import replace

        from optpipe.imitation import imitation, teacher_of

        from .hints import HintedLoss, Watched, outputs_of_layers, projection
        from .student import learn, student_of

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
        """The layers to compare; the middle one of those with layers inside, as in the paper, where none is named."""
        asked = [("hints", "student", student, self.hints)]
        asked += [
            ("teacher_hints" if self.teacher_hints else "hints", "teacher", teacher, self.teacher_hints or self.hints)
        ]
        for setting, whose, layers, names in asked:
            for name in names:
                if name not in layers:
                    hint = did_you_mean(name, layers) or f"; it has, for example, {list(layers)[:3]}"
                    raise StageError(
                        f"{setting} names '{name}', which is no layer of the {whose} that gives a tensor{hint}"
                    )
        if self.hints:
            return dict(zip(self.hints, self.teacher_hints or self.hints, strict=True))
        common = [name for name in student if name in teacher]
        blocks = [name for name in common if any(other.startswith(f"{name}.") for other in student)]
        if not common:
            raise StageError(
                "student and teacher have no layer of the same name; give hints and teacher_hints, for example "
                f"hints=[{next(iter(student), '')}] teacher_hints=[{next(iter(teacher), '')}]"
            )
        middle = (blocks or common)[len(blocks or common) // 2]
        return {middle: middle}

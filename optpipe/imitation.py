"""Imitation: the loss that makes a model answer as its teacher does, for outputs of any kind."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optpipe.errors import StageError
from optpipe.predictions import is_multilabel
from optpipe.task import Inputs, Task, call, named_tensors, tensors_in

if TYPE_CHECKING:
    from optpipe.context import Context

REMEDY = (
    "give a student whose outputs have the teacher's shapes, for example by student_args, or train it on the labels "
    "alone with distill/finetune"
)


class Kind(Enum):
    """What an output says of a sample, or of each of its positions."""

    classes = "classes"  # logits of one class among several
    labels = "labels"  # a logit for each of several labels that may hold at once
    values = "values"  # numbers


@dataclass(eq=False)
class Imitation:
    """An `optpipe.training.Loss`: alpha · soft loss to the teacher + (1 - alpha) · task loss (Hinton et al. 2015).

    The soft loss of each output depends on its kind, which its shape and that of its target decide on the first batch:

    - classes: T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over samples and positions; positions whose
      target the task's loss ignores are left out. Where whole-number targets have the outputs' shape without one
      dimension: (n, classes), (n, length, classes) or (n, classes, length), any number of dimensions for length; or
      where the task's loss is cross-entropy with probabilities as targets. If length equals the number of classes,
      they lie in dimension 1 for torch's cross-entropy and in the last one for any other loss.
    - labels: T² · KL of the two Bernoulli distributions of each label. Where targets are 0 or 1 for each output, of
      shape (n, labels), or of any shape if the task's loss is torch's binary cross-entropy with logits.
    - values: squared difference to the teacher, whatever T. Everything else, such as regression.

    The outputs of a tuple or dict are added up; each has the target of its own place or name, or, if there is one
    target for all, the first output that it fits has it. Outputs that are not floating-point are left to the task.
    """

    teacher: nn.Module
    task: Task
    alpha: float
    temperature: float
    kinds: dict[str, Kind] = field(default_factory=dict)  # of each output, known after the first batch
    _dimensions: dict[str, int] = field(default_factory=dict)  # that of the classes

    def __call__(self, inputs: Inputs, outputs: Any, target: Any) -> Tensor:
        self.teacher.to(tensors_in(inputs)[0].device)
        with torch.no_grad():
            wanted = call(self.teacher, inputs)
        return self.loss(outputs, wanted, target)

    def loss(self, outputs: Any, wanted: Any, target: Any) -> Tensor:
        """The loss of a student's `outputs` where the teacher gave `wanted`. StageError if their shapes differ."""
        outputs, wanted = self.task.selected(outputs), self.task.selected(wanted)
        check_outputs_fit(outputs, wanted)
        total = (1 - self.alpha) * self.task.loss(outputs, target) if self.alpha < 1 else 0.0
        targets = _targets(outputs, target, self.task.loss)
        parts = dict(named_tensors(wanted))
        soft = [
            self._soft(name, part, parts[name], targets.get(name))
            for name, part in named_tensors(outputs)
            if part.is_floating_point()
        ]
        return total + self.alpha * torch.stack(soft).sum()

    def describe(self) -> str:
        """The kinds of all outputs, as in "classes" or "logits: classes, box: values"."""
        if list(self.kinds) == [""]:
            return self.kinds[""].value
        return ", ".join(f"{name}: {kind.value}" for name, kind in self.kinds.items())

    def _soft(self, name: str, student: Tensor, teacher: Tensor, target: Any) -> Tensor:
        if name not in self.kinds:
            self.kinds[name], self._dimensions[name] = _kind(student, target, self.task.loss)
        if self.kinds[name] is Kind.values:
            return F.mse_loss(student, teacher)
        student, teacher, t = student / self.temperature, teacher / self.temperature, self.temperature
        if self.kinds[name] is Kind.labels:
            return t * t * _bernoulli_kl(student, teacher)
        dimension = self._dimensions[name]
        kl = F.kl_div(
            F.log_softmax(student, dimension), F.log_softmax(teacher, dimension), reduction="none", log_target=True
        ).sum(dimension)
        counted = _counted(target, kl, self.task.loss)
        return t * t * (kl.mean() if counted is None else (kl * counted).sum() / counted.sum().clamp(min=1))


def imitation(teacher: nn.Module, task: Task, *, alpha: float, temperature: float) -> Imitation:
    """The loss of a student of `teacher`, which is put in eval mode and follows its inputs to their device."""
    return Imitation(teacher.eval(), task, alpha, temperature)


def check_outputs_fit(student: Any, teacher: Any) -> None:
    """Raises StageError unless both give tensors of the same shapes, some of them floating-point."""
    if shapes_of(student) != shapes_of(teacher):
        raise StageError(
            f"the student cannot imitate its teacher: the student gives {shapes_of(student)} and the teacher "
            f"{shapes_of(teacher)}; {REMEDY}"
        )
    if not any(tensor.is_floating_point() for _, tensor in named_tensors(teacher)):
        raise StageError(
            f"the teacher returns {type(teacher).__name__} without a floating-point tensor, so there is nothing to "
            "imitate; train on the labels alone with distill/finetune"
        )


def shapes_of(value: Any) -> str:
    """Of all tensors in `value`, as in "[(16, 4)]" or "[logits (16, 4), box (16, 2)]"."""
    return "[" + ", ".join(f"{name} {tuple(tensor.shape)}".strip() for name, tensor in named_tensors(value)) + "]"


def _targets(outputs: Any, target: Any, task_loss: Any) -> dict[str, Tensor]:
    """The target of each output that has one."""
    parts, targets = dict(named_tensors(outputs)), dict(named_tensors(target))
    if set(targets) != {""} or "" in parts:
        return {name: targets[name] for name in parts if name in targets}
    fits = (name for name, part in parts.items() if _kind(part, targets[""], task_loss)[0] is not Kind.values)
    return {next(fits, next(iter(parts), "")): targets[""]}


def _kind(outputs: Tensor, target: Any, task_loss: Any) -> tuple[Kind, int]:
    """The kind of `outputs` and, for classes, their dimension."""
    if not isinstance(target, Tensor) or not outputs.is_floating_point():
        return Kind.values, 0
    cross_entropy = task_loss is F.cross_entropy or isinstance(task_loss, nn.CrossEntropyLoss)
    bernoulli = task_loss is F.binary_cross_entropy_with_logits or isinstance(task_loss, nn.BCEWithLogitsLoss)
    if target.shape == outputs.shape and outputs.dim() > 1:
        if cross_entropy and target.is_floating_point():
            return Kind.classes, 1
        if bernoulli or is_multilabel(outputs, target):
            return Kind.labels, 0
    if bernoulli and target.shape == outputs.shape:
        return Kind.labels, 0
    if not target.is_floating_point() and outputs.dim() == target.dim() + 1:
        places = [d for d in (1, outputs.dim() - 1) if _without(outputs.shape, d) == tuple(target.shape)]
        if places:
            return Kind.classes, places[0 if cross_entropy else -1]
    return Kind.values, 0


def _without(shape: torch.Size, dimension: int) -> tuple[int, ...]:
    return tuple(size for d, size in enumerate(shape) if d != dimension)


def _counted(target: Any, kl: Tensor, task_loss: Any) -> Tensor | None:
    """The positions that the task's loss counts; None where all do."""
    if not isinstance(target, Tensor) or target.shape != kl.shape or target.is_floating_point():
        return None
    return target != getattr(task_loss, "ignore_index", -100)  # torch's default


def _bernoulli_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(sigmoid(teacher) ‖ sigmoid(student)) of all logits."""
    cross_entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid())
    return cross_entropy - F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid())


def teacher_of(ctx: Context) -> nn.Module:
    """A copy of the baseline that is free to be moved."""
    teacher = copy.deepcopy(ctx.baseline).eval().requires_grad_(False)
    # convolutions alone; a third less time on a CPU
    for weight in teacher.parameters():
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return teacher

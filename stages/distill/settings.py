"""The settings that the methods of this family share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optpipe.schedule import Schedule


@dataclass(kw_only=True)
class Learning(Schedule):
    """What is trained, for how long, and what decides which epoch is kept: a slice of the training data."""

    epochs: int = 10
    learning_rate: float = 1e-3
    held_out: float = 0.1  # share of the training data that picks the best epoch
    student: str | None = None  # dotted path of a callable that returns it; without one, the current model
    student_args: dict[str, Any] = field(default_factory=dict)  # the callable's keyword arguments
    checkpoint: str | None = None  # folder of the state to go on from, and to keep; the step's own without one

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be above 0 and below 1")
        if self.student is not None and not self.student.rpartition(".")[0]:
            raise ValueError(
                f"student is '{self.student}'; it must be the dotted path of a callable, for example my_package.make"
            )
        if self.student_args and self.student is None:
            raise ValueError("student_args are given without a student; name the callable that takes them")


@dataclass(kw_only=True)
class Imitating(Learning):
    """How much the teacher counts, and how softly it speaks."""

    learning_rate: float = 3e-3
    temperature: float = 4.0  # T: the higher, the more the small probabilities count
    alpha: float = 0.7  # weight of the teacher against the labels

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be between 0 and 1")

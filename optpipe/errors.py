"""What can go wrong.

OptpipeError
├── RecipeError    the recipe or its settings are wrong; no work was started
└── StageError     a stage cannot do to this model what it was asked to do
    └── OverBudget     what it did breaks the budget, whose policy is to stop there
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

EXIT_PROBLEM, EXIT_INTERRUPTED = 1, 130  # of the command


class OptpipeError(Exception):
    """Base of every error that a user can mend. Its text says what was asked, what was found and what to do."""

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *getattr(self, "__notes__", [])])


class RecipeError(OptpipeError):
    """The recipe or its settings are wrong. Carries every problem that was found, not only the first."""

    def __init__(self, problems: Sequence[str], subject: str = "this run") -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  - ".join([f"{subject} cannot run, {count}:", *self.problems]))


class StageError(OptpipeError):
    """A stage cannot do to this model what it was asked to do."""


class OverBudget(StageError):
    """A step's result breaks the budget, whose policy is to stop there."""


def reason(error: BaseException) -> str:
    """The first line of `error` with words in it: those below are other libraries' traces and advice."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_reason(error: BaseException) -> str:
    """The same behind the kind of error that it is."""
    kind, said = type(error).__name__, reason(error)
    return kind if said == kind else f"{kind}: {said}"


def is_interruption(error: BaseException | None) -> bool:
    """Whether `error` is a Ctrl-C, or was raised while one was dealt with: some libraries turn it into their own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'quantize'?` if something known is close to `word`, else an empty string."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""

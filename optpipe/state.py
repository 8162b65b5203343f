"""State: the model between two steps of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optpipe.forms import Form
from optpipe.report import Measurement


@dataclass(frozen=True)
class State:
    """A model, saved and measured."""

    model: Any
    form: Form
    folder: Path  # where it was saved
    hash: str
    measurement: Measurement
    results: int  # of the report's, up to here
    engine: str = ""  # that the benchmark chose to run it; by default the target's, if that can
    is_accepted: bool = True  # by the budget; a later step that breaks it can be rolled back to here

    def reloaded(self) -> State:
        """The same with a model of its own, for a branch that may change it."""
        return replace(self, model=self.form.load(self.folder))

"""State: the model between two steps of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optpipe.artifact import Artifact
from optpipe.report import Measurement
from optpipe.reuse import Place


@dataclass(frozen=True)
class State:
    """A model, saved and measured."""

    artifact: Artifact
    measurement: Measurement
    results: int  # of the report's, up to here
    engine: str = ""  # that the benchmark chose to run it; by default the target's, if that can
    is_accepted: bool = True  # by the budget; a later step that breaks it can be rolled back to here

    @property
    def place(self) -> Place:
        """What the next step is given."""
        return Place(self.artifact.form.NAME, self.artifact.hash, self.engine)

    def unloaded(self) -> State:
        """The same without the memory that a loaded model takes."""
        return replace(self, artifact=self.artifact.unloaded())

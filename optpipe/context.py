"""Context: what a stage may see and use while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from optpipe.progress import track
from optpipe.target import Target

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from optpipe.measure.measurer import Measurer
    from optpipe.report import Latency
    from optpipe.task import Task

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Context:
    """Frozen and small. It holds neither the configuration nor the tracker nor another stage's results."""

    dir: Path  # this step's own folder
    task: Task
    target: Target
    baseline: nn.Module  # the model as it came in; never written to
    device: str  # to train on: "cpu", "cuda", "cuda:1"
    seed: int  # of this step; torch's generator was seeded with it
    measurer: Measurer
    latencies: list[Latency] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, **facts: Any) -> None:
        """Keep facts for the report: numbers, strings, or lists of them."""
        self.facts.update(facts)

    def note(self, text: str) -> None:
        """Keep a sentence for the report."""
        self.notes.append(text)

    def time(self, model: Any, batch_sizes: Sequence[int], threads: Sequence[int]) -> list[Latency]:
        """Time `model`, of any form, against the baseline on a grid in the target's runtime; the report shows it.

        Empty, with a note that says why, where this machine cannot run what is placed for the target.
        """
        if not self.target.is_host:
            self.note(f"nothing was timed: {self.target.elsewhere()}")
            return []
        found = self.measurer.latencies(model, self.dir, batch_sizes, threads)
        self.latencies.extend(found)
        return found

    def progress(self, steps: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """`steps`, with a progress bar while they are consumed."""
        return track(steps, description, total)

    @cached_property
    def fabric(self) -> Fabric:
        """Lightning Fabric on `device`."""
        from lightning_fabric import Fabric

        kind, _, index = self.device.partition(":")
        return Fabric(accelerator=kind, devices=[int(index)] if index else 1)

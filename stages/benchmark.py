"""Benchmark: time the model against the baseline over a grid.

Takes any form and passes it through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optpipe.context import Context
from optpipe.registry import register


@register("benchmark/latency", takes=("torch", "program", "onnx"), gives="same")
@dataclass(kw_only=True)
class Latency:
    """Paired latency for every batch size and number of threads, in the target's runtime."""

    batch_sizes: list[int] = field(default_factory=list)  # by default the target's
    threads: list[int] = field(default_factory=list)  # by default the target's

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "threads"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} is {list(getattr(self, name))}; every entry must be at least 1")

    def run(self, model: Any, ctx: Context) -> Any:
        grid = ctx.time(model, self.batch_sizes or ctx.target.batch_sizes, self.threads or [ctx.target.threads])
        if grid:
            faster = sum(entry.verdict == "faster" for entry in grid)
            ctx.note(f"{faster} of {len(grid)} grid points are faster than the baseline as it came in")
        return model

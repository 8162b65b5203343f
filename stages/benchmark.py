"""Benchmark: time the model against the baseline over a grid, under several callers, and for a while.

Takes any form and passes it through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optpipe.context import Context
from optpipe.forms import FORMS
from optpipe.registry import register


@register("benchmark/latency", takes=FORMS, gives="same")
@dataclass(kw_only=True)
class Latency:
    """Paired latency for every batch size and number of threads, and the load that the model stands, in the target's
    runtime."""

    batch_sizes: list[int] = field(default_factory=list)  # by default the target's
    threads: list[int] = field(default_factory=list)  # by default the target's
    callers: list[int] = field(default_factory=lambda: [1, 2, 4])  # threads that call one model at once
    sustained_seconds: float = 0.0  # of calls without a pause; 60 shows heat and throttling

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "threads", "callers"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} is {list(getattr(self, name))}; every entry must be at least 1")
        if self.sustained_seconds < 0:
            raise ValueError(f"sustained_seconds is {self.sustained_seconds}; it must not be negative")

    def run(self, model: Any, ctx: Context) -> Any:
        grid = ctx.time(model, self.batch_sizes or ctx.target.batch_sizes, self.threads or [ctx.target.threads])
        callers = ctx.time_callers(model, self.callers)
        sustained = ctx.time_sustained(model, self.sustained_seconds)
        if grid:
            faster = sum(entry.verdict == "faster" for entry in grid)
            ctx.note(
                f"{faster} of the {len(grid)} grid points that were timed are faster than the baseline as it came in"
            )
        if len(callers) > 1:
            best = max(callers, key=lambda entry: entry.throughput)
            ctx.note(
                f"{best.callers} callers at once get the most out of it: {best.throughput:,.0f} samples per second"
            )
        if sustained and sustained.drift > 1.05:
            ctx.note(
                f"over {sustained.seconds:.0f} s without a pause a call became {sustained.drift:.2f} times as long"
            )
        return model

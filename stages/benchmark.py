"""Benchmark: time the model against the baseline over a grid, under several callers, and for a while.

Takes any form and passes it through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optpipe.context import Context
from optpipe.errors import StageError, did_you_mean
from optpipe.forms import FORMS, SPOKEN, form_of
from optpipe.registry import register
from optpipe.runtimes import RUNTIMES, installed_for, missing
from optpipe.target import Target

INSTALLED = "installed"


@register("benchmark/latency", takes=FORMS, gives="same")
@dataclass(kw_only=True)
class Latency:
    """Paired latency for every batch size and number of threads, and the load that the model stands.

    In the target's runtime, or in the fastest of several that the budget allows; that one then is the deployed model's.
    """

    runtimes: list[str] = field(default_factory=list)  # to compare and choose from, or [installed]; else the target's
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

    def problems(self, target: Target) -> list[str]:
        if self.runtimes == [INSTALLED]:
            return []
        unknown = [name for name in self.runtimes if name not in RUNTIMES]
        absent = [name for name in self.runtimes if name in RUNTIMES and missing(name)]
        known = f"there are {', '.join(RUNTIMES)}, or [{INSTALLED}] for all that run the file"
        found = [f"runtimes names '{name}'{did_you_mean(name, RUNTIMES) or '; ' + known}" for name in unknown]
        return found + [f'runtimes names {name}, not installed here; pip install "optpipe[{name}]"' for name in absent]

    def run(self, model: Any, ctx: Context) -> Any:
        if self.runtimes:
            ctx.time_engines(model, self._engines(model, ctx.target))
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

    def _engines(self, model: Any, target: Target) -> list[str]:
        """Those to compare, the target's first. Raises StageError for one that cannot run the model's form."""
        found = form_of(model)
        assert found is not None
        able = installed_for(found.NAME)
        if found.NAME in ("torch", "program"):
            raise StageError(
                f"runtimes compares engines of a file, and the model is {SPOKEN[found.NAME]}; export it before"
            )
        if self.runtimes != [INSTALLED] and (others := sorted(set(self.runtimes) - set(able))):
            raise StageError(f"runtimes names {', '.join(others)}, which cannot run {SPOKEN[found.NAME]}")
        named = able if self.runtimes == [INSTALLED] else self.runtimes
        return sorted(named, key=lambda name: name != target.runtime)

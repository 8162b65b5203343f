"""What a run found out: the schema of report.json, and the table for the console.

Figures that could not be measured are a NotMeasured with the reason, never 0 and never missing. Keys may be added to
the schema, not renamed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from optpipe.measure.latency import Verdict

SCHEMA = 1
FILE = "report.json"
RunStatus = Literal["ok", "failed", "over_budget"]
StageStatus = Literal["ok", "unchanged", "rolled_back", "failed"]


@dataclass(frozen=True)
class NotMeasured:
    """Why there is no figure."""

    not_measured: str


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality on the test split, and its difference from the baseline's on the same samples (a point is 0.01)."""

    metric: str
    value: float
    ci95: tuple[float, float]
    n: int
    delta: float
    delta_ci95: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call, in one runtime, with one batch size and number of threads.

    speedup: time of the baseline as it came in / this time.
    speedup_same_runtime: time of the unoptimised baseline in the same runtime / this time.
    """

    runtime: str
    batch_size: int
    threads: int
    p50_ms: float
    p95_ms: float
    std_ms: float
    throughput: float  # samples per second
    speedup: float
    speedup_ci95: tuple[float, float]
    speedup_same_runtime: float | NotMeasured
    speedup_same_runtime_ci95: tuple[float, float] | NotMeasured
    verdict: Verdict
    calls: int  # timed
    preview: bool = False  # of a file exported only to be measured


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Size, quality, latency and memory of one model."""

    size_bytes: int | NotMeasured
    quality: Quality | NotMeasured
    latency: list[Latency] | NotMeasured
    peak_memory_bytes: int | NotMeasured

    def headline(self) -> Latency | None:
        """Latency at batch 1 with the target's threads: always the first entry."""
        return None if isinstance(self.latency, NotMeasured) else self.latency[0]

    def with_grid(self, grid: list[Latency]) -> Measurement:
        """The same with the other points of a grid behind the headline."""
        first = self.headline()
        if first is None:
            return replace(self, latency=grid)
        point = (first.runtime, first.batch_size, first.threads)
        others = [entry for entry in grid if (entry.runtime, entry.batch_size, entry.threads) != point]
        return replace(self, latency=[first, *others])


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One alternative that was tried for a step."""

    method: str
    ok: bool
    reason: str


@dataclass(kw_only=True)
class StageResult:
    """One step of the pipeline."""

    key: str
    stage: str
    status: StageStatus
    seconds: float
    form: str
    measurement: Measurement | NotMeasured
    cached: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Final:
    """The model that came out."""

    artifact: str
    measurement: Measurement


@dataclass(kw_only=True)
class BudgetReport:
    """The limits of the run and those that its result breaks."""

    limits: dict[str, float]
    policy: str
    violations: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Report:
    """report.json."""

    recipe: str
    overrides: list[str]
    environment: dict[str, Any]
    budget: BudgetReport
    status: RunStatus = "failed"
    schema: int = SCHEMA
    mlflow_run_id: str = ""
    seconds: float = 0.0
    model_seconds: float = 0.0  # of `seconds`, what making (or training) the incoming model and its data took
    measuring_seconds: float = 0.0  # of `seconds`, what measuring and previews took
    overhead_seconds: float = 0.0  # of `seconds`, what is left beside those and the stages' own
    baseline: Measurement | NotMeasured = field(default_factory=lambda: NotMeasured("the run ended before"))
    stages: list[StageResult] = field(default_factory=list)
    final: Final | NotMeasured = field(default_factory=lambda: NotMeasured("the run ended before"))
    error: str = ""

    def write(self, folder: Path) -> Path:
        """Write report.json into `folder`, whole or not at all."""
        partial = folder / f".{FILE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2, allow_nan=False, default=str) + "\n")
        return partial.rename(folder / FILE)


def table(report: Report) -> Any:
    """The run as a rich table: a row for the baseline in each runtime, and one per step."""
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"{report.recipe or 'pipeline'}: {report.status}; latency at batch 1 on the target"
    view = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("step", "status", "s"):
        view.add_column(column, justify="right" if column == "s" else "left", no_wrap=True)
    for column in ("KB", "quality", "Δ points [95 %]", "p50 ms", "× faster [95 %]", "verdict", "× same runtime"):
        view.add_column(column, justify="right", no_wrap=True)
    if isinstance(report.baseline, Measurement) and not isinstance(report.baseline.latency, NotMeasured):
        for entry in report.baseline.latency:
            size, *figures = _figures(report.baseline, entry)
            view.add_row(f"baseline, {entry.runtime}", "", "", size if entry.runtime == "torch" else "", *figures)
        view.add_section()
    for stage in report.stages:
        name = stage.stage if stage.stage.startswith(f"{stage.key}/") else f"{stage.key} ({stage.stage})"
        measurement = stage.measurement
        figures = ["–"] * 7 if isinstance(measurement, NotMeasured) else _figures(measurement, measurement.headline())
        view.add_row(name, stage.status, f"{stage.seconds:.1f}", *figures)
    return view


def _figures(measurement: Measurement, latency: Latency | None) -> list[str]:
    size, quality = measurement.size_bytes, measurement.quality
    cells = ["–" if isinstance(size, NotMeasured) else f"{size / 1000:.1f}"]
    if isinstance(quality, NotMeasured):
        cells += ["–", "–"]
    else:
        low, high = quality.delta_ci95
        cells += [f"{quality.value:.2%}", f"{quality.delta * 100:+.2f} [{low * 100:+.2f}, {high * 100:+.2f}]"]
    if latency is None:
        return [*cells, "–", "–", "–", "–"]
    low, high = latency.speedup_ci95
    same = latency.speedup_same_runtime
    shown = "–" if isinstance(same, NotMeasured) else f"{same:.2f}"
    return [*cells, f"{latency.p50_ms:.3f}", f"{latency.speedup:.2f} [{low:.2f}, {high:.2f}]", latency.verdict, shown]

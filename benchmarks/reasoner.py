"""Does +recipe=reasoner keep what it promises? `python benchmarks/reasoner.py` (minutes; exit code 1 if it does not).

    python benchmarks/reasoner.py                           # runs the recipe, and judges what its report says
    python benchmarks/reasoner.py outputs/runs/<time>       # judges a run that is there

Every ratio is against the reasoner as it came in, in eager PyTorch with as many threads: both take turns in the same
rounds. Jitter is p95 - p50 of the calls of those rounds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optpipe.report import Latency, NotMeasured, Quality, Report, figures

THREADS = (1, 2)
SPEEDUP = {1: 200, 4: 250, 8: 250, 16: 250}  # by batch size, at least
JITTER = 25  # times smaller at batch 1, at least
SIZE = 20  # times smaller, at least
POINTS = 0.5  # of quality that may be lost, at most
STAGES = ("simplify", "prune", "distill", "quantize", "trace", "export", "benchmark")


@dataclass(frozen=True)
class Bar:
    """One thing that was promised, and what was measured."""

    promise: str
    found: str
    holds: bool

    def __str__(self) -> str:
        return f"| {self.promise} | {self.found} | {'holds' if self.holds else 'does not hold'} |"


def main() -> int:
    if len(sys.argv) > 1:
        return judge(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "+recipe=reasoner",
            f"benchmark.threads=[{','.join(map(str, THREADS))}]",
            "tracking=none",
            "store=none",
        ]
        words.append("measure.max_seconds=60")  # the original on every core of a machine is not a quiet thing to time
        command = [sys.executable, "-m", "optpipe", *words, f"hydra.run.dir={folder}/run"]
        subprocess.run(command, check=True)
        return judge(Path(folder) / "run")


def judge(run: Path) -> int:
    """Print a line per promise; 1 if one is not kept."""
    report = Report.read(run)
    bars = list(promises(report, run))
    print("| promised | measured | |\n| --- | --- | --- |", *bars, sep="\n")
    notes = [note for stage in report.stages for note in stage.notes if note.startswith("not measured")]
    print("", *notes, sep="\n")
    return 0 if all(bar.holds for bar in bars) else 1


def promises(report: Report, run: Path) -> Iterator[Bar]:
    """What issue and recipe say, each beside its figure."""
    final = report.final.measurement
    timed = [] if isinstance(final.latency, NotMeasured) else final.latency
    points = {(entry.batch_size, entry.threads): entry for entry in timed}
    for threads in THREADS:
        for size, least in SPEEDUP.items():
            yield speed(points.get((size, threads)), f"batch {size}, {threads} thread(s): ≥ {least} × faster", least)
    for threads in THREADS:
        yield jitter(points.get((1, threads)), threads, run)
    yield quality(report.baseline.quality, final.quality)
    before, after = report.baseline.size_bytes, final.size_bytes
    found = f"{before / after:.0f} × ({figures.size(before)} → {figures.size(after)})"
    yield Bar(f"file ≥ {SIZE} × smaller", found, before / after >= SIZE)
    worked = [stage for stage in report.stages if stage.status == "ok"]
    families = [family for family in STAGES if any(stage.stage.startswith(f"{family}/") for stage in worked)]
    found = f"{len(worked)} of {len(report.stages)} steps ok, of {len(families)} families"
    yield Bar("all seven stages ok", found, len(families) == len(STAGES) and len(worked) == len(report.stages))


def speed(point: Latency | None, promise: str, least: float) -> Bar:
    """It holds where the figure does; the interval is told."""
    if point is None:
        return Bar(promise, "not measured", False)
    low, high = point.speedup_ci95
    found = f"{point.speedup:.0f} × [{low:.0f}, {high:.0f}], {point.p50_ms * 1000:.1f} µs"
    return Bar(promise, found, point.speedup >= least)


def jitter(point: Latency | None, threads: int, run: Path) -> Bar:
    """From every call that the comparison at batch 1 timed."""
    promise = f"batch 1, {threads} thread(s): jitter ≥ {JITTER} × smaller"
    if point is None:
        return Bar(promise, "not measured", False)
    with np.load(run / point.samples) as calls:
        before, after = (float(np.diff(np.percentile(calls[name], [50, 95]))[0]) for name in ("eager", "subject"))
    found = f"{before / after:.0f} × ({before * 1000:.0f} → {after * 1000:.2f} µs)"
    return Bar(promise, found, before / after >= JITTER)


def quality(before: Quality, after: Quality) -> Bar:
    lost = -after.delta * 100
    (low, high), (least, most) = (tuple(end * 100 for end in found.ci95) for found in (before, after))
    left, right = (end * 100 for end in after.delta_ci95)
    found = (
        f"{before.value:.2%} [{low:.2f}, {high:.2f}] → {after.value:.2%} [{least:.2f}, {most:.2f}], "
        f"{after.delta * 100:+.2f} points [{left:+.2f}, {right:+.2f}], n={after.n}"
    )
    return Bar(f"{after.metric} within {POINTS} point of the original's", found, lost <= POINTS)


if __name__ == "__main__":
    sys.exit(main())

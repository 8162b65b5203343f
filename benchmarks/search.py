"""Does a search find a better front than as many runs drawn at random, inside the same budget?

    python benchmarks/search.py                      # three seeds, 30 trials: over an hour on 2 slow cores
    python benchmarks/search.py --seeds 1 --trials 12

Each seed: a search by TPE, which is killed (kill -9) on the way and goes on by the same command, and a sweep of as many
combinations drawn at random. Objectives: quality on validation, and size of the file; nothing is timed, so that all
figures are exact. A front's hypervolume is the area that it dominates, of quality lost (up to the budget's limit) by
the logarithm of how many times smaller the file is; runs beyond the budget do not count. All runs share one store. Ends
with 1 if a search's front is worse than that of its random sweep.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 0.03  # of quality that may be lost
WORDS = (
    "--multirun", "+recipe=edge_int8", "hydra/sweeper=search", "prune=low_rank", "prune.budget=interval(0.1,0.95)",
    "quantize=weight_only", "quantize.bits=4,8", "quantize.group_size=0,16,32,64,128",
    f"budget.quality_drop={LIMIT}", "hydra.sweeper.objectives=[quality,size]", "target.instruction_set=neon",
    "measure.previews=false", "rehearse=false", "tracking=none", "pipeline=[simplify,prune,quantize,trace,export]",
)  # fmt: skip
Point = tuple[float, float]  # quality lost, size / size as it came in


@dataclass(frozen=True)
class Found:
    """What one sweep of jobs came to."""

    points: list[Point]  # of the jobs that kept the budget
    jobs: int
    stopped: int
    seconds: float

    @property
    def hypervolume(self) -> float:
        return hypervolume(self.points)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=30)
    asked = parser.parse_args()
    print("| seed | by | jobs | stopped early | inside the budget | hypervolume | killed after | s |\n|" + " --- |" * 8)
    worse = 0
    with tempfile.TemporaryDirectory() as name:
        for seed in range(asked.seeds):
            found = {}
            for sampler in ("tpe", "random"):
                kill_after = asked.trials // 2 if sampler == "tpe" else None
                found[sampler] = run(Path(name), sampler, seed, asked.trials, kill_after)
                one = found[sampler]
                print(
                    f"| {seed} | {sampler} | {one.jobs} | {one.stopped} | {len(one.points)} | {one.hypervolume:.4f} | "
                    f"{kill_after or '–'} | {one.seconds:.0f} |",
                    flush=True,
                )
            worse += found["tpe"].hypervolume < found["random"].hypervolume
    print(f"{asked.seeds - worse} of {asked.seeds} searches found a front at least as good as their random sweep's")
    return int(worse > 0)


def run(root: Path, sampler: str, seed: int, trials: int, kill_after: int | None) -> Found:
    """One search; ends this program where it fails. kill_after: jobs."""
    folder, begin = root / f"{sampler}_{seed}", time.monotonic()
    words = [
        *WORDS, f"store.folder={root / 'store'}", f"hydra.sweep.dir={folder}", f"hydra.sweeper.sampler={sampler}",
        f"hydra.sweeper.seed={seed}", f"hydra.sweeper.trials={trials}",
    ]  # fmt: skip
    if kill_after:
        killed(words, folder, kill_after)
    done = subprocess.run([sys.executable, "-m", "optpipe", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{folder.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    states = [job["state"] for job in jobs_of(folder)]
    if sorted(set(states)) not in (["done"], ["done", "stopped"]) or len(states) != trials:
        sys.exit(f"{folder.name}: {len(states)} jobs, {sorted(set(states))}\n{done.stderr}")
    return Found(points(folder), len(states), states.count("stopped"), time.monotonic() - begin)


def killed(words: list[str], folder: Path, jobs: int) -> None:
    """Begin, and end with SIGKILL once so many jobs are over."""
    process = subprocess.Popen(
        [sys.executable, "-m", "optpipe", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and sum(job["state"] != "running" for job in jobs_of(folder)) < jobs:
        time.sleep(0.2)
    time.sleep(1.0)  # into the next one
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def jobs_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("jobs/[0-9]*.json")]


def points(folder: Path) -> list[Point]:
    found = []
    for job in jobs_of(folder):
        report = json.loads((Path(job["folder"]) / "report.json").read_text())
        if job["state"] == "done" and report["final"]["quality_drop"] <= LIMIT:
            ratio = report["final"]["measurement"]["size_bytes"] / report["baseline"]["size_bytes"]
            found.append((report["final"]["quality_drop"], ratio))
    return found


def hypervolume(points: list[Point]) -> float:
    """Of quality lost, from LIMIT down, by ln(times smaller)."""
    area, best = 0.0, 0.0
    for drop, ratio in sorted(points, key=lambda point: point[1]):  # the smallest first
        gained = LIMIT - drop
        if gained > best:
            area += (gained - best) * max(0.0, -math.log(ratio))
            best = gained
    return area / LIMIT


if __name__ == "__main__":
    sys.exit(main())

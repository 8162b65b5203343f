"""Which engine runs a quantised file fastest, and whether the choice is the same the next time.

    python benchmarks/engines.py        # about five minutes

Runs `+recipe=edge_int8 benchmark=runtimes` without training, REPEATS times for each network, and prints for each run
the file, every engine's time and the choice. Ends with 1 unless all runs of a network have the same file and choice,
the manifest names the choice, and no other engine was faster beyond doubt.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from optpipe import manifest
from optpipe.report import Attempt, Latency, Report, figures

REPEATS = 3
NETWORKS = ("digits", "docstrings")
STEPS = "pipeline=[simplify,quantize,trace,export,benchmark]"


def main() -> int:
    print("| network | run | file | engine | p50 | × faster than it came in [95 %] | |\n" + "| --- " * 7 + "|")
    return int(not all([holds(network) for network in NETWORKS]))


def holds(network: str) -> bool:
    """Run it REPEATS times, print a row for each engine, and say whether the choice stands."""
    choices, hashes, is_right = set(), set(), True
    for number in range(1, REPEATS + 1):
        with tempfile.TemporaryDirectory() as folder:
            words = ["+recipe=edge_int8", f"model={network}", f"data={network}", STEPS, "benchmark=runtimes"]
            command = [
                sys.executable,
                "-m",
                "optpipe",
                *words,
                "tracking=none",
                "store=none",
                f"hydra.run.dir={folder}/run",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            run = Path(folder) / "run"
            attempts, found = Report.read(run).stages[-1].attempts, manifest.read(run)
        file = found["files"]["model.onnx"]["sha256"][:8]
        for attempt in attempts:
            print(f"| {network} | {number} | {file} | {attempt.method} | {shown(attempt)} |", flush=True)
        (chosen,) = (attempt for attempt in attempts if attempt.chosen)
        choices.add(chosen.method)
        hashes.add(file)
        is_right &= found["runtime"] == chosen.method and not any(is_faster(other, chosen) for other in attempts)
    return is_right and len(choices) == len(hashes) == 1


def shown(attempt: Attempt) -> str:
    if not isinstance(attempt.latency, Latency):
        return f"not measured | | {attempt.reason}"
    low, high = attempt.latency.speedup_ci95
    ratio = f"{attempt.latency.speedup:.2f} [{low:.2f}, {high:.2f}]"
    return f"{figures.milliseconds(attempt.latency.p50_ms)} | {ratio} | {'chosen' if attempt.chosen else ''}"


def is_faster(one: Attempt, other: Attempt) -> bool:
    """Whether `one` is faster than `other` beyond doubt."""
    if not isinstance(one.latency, Latency) or not isinstance(other.latency, Latency):
        return False
    return one.latency.speedup_ci95[0] > other.latency.speedup_ci95[1] * 1.02


if __name__ == "__main__":
    sys.exit(main())

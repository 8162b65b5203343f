"""Does the bench tell the truth? A model against itself (A/A), and against a copy with 20 % more work (A/B).

    python benchmarks/honesty.py              # about 7 minutes
    python benchmarks/honesty.py --busy       # the same while another process keeps one core busy

Twenty comparisons of each kind, with the settings of `measure=default`, on three networks of 0.05 to 20 ms. An A/A
comparison that claims a difference is wrong. An A/B interval is right if it holds the truth, which is the same ratio
measured with eight times as many processes a side: the mean of 8 comparisons with 15 each.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from torch import nn

from optpipe import lower
from optpipe.forms import form
from optpipe.machine import cpu, usable_cores
from optpipe.measure.latency import Bench, Contender
from optpipe.measure.settings import Measure
from optpipe.measure.statistics import Ratio
from optpipe.task import Task, top1_accuracy

COMPARISONS = 20
TRUTH_COMPARISONS, TRUTH_REPLICAS = 8, 15


def mlp(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers).eval()


def convolutions(depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers).eval()


# name, runtime, shape of a sample, batch size, the network, the same with 20 % more layers
NETWORKS = {
    "mlp in ONNX Runtime": ("onnxruntime", (288,), 1, lambda: mlp(288, 10), lambda: mlp(288, 12)),
    "convolutions in PyTorch": ("torch", (32, 24, 24), 1, lambda: convolutions(10), lambda: convolutions(12)),
    "mlp in PyTorch": ("torch", (1024,), 64, lambda: mlp(1024, 10), lambda: mlp(1024, 12)),
}


class Pair:
    """A network and its copy with more work, saved for the bench."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.runtime, shape, batch, small, large = NETWORKS[name]
        torch.manual_seed(0)
        self.a, self.b = (self._saved(make(), folder / which, shape) for which, make in (("a", small), ("b", large)))
        self.batch = folder / "batch.npz"
        np.savez(self.batch, **{"0": np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)})

    def _saved(self, model: nn.Module, folder: Path, shape: tuple[int, ...]) -> Contender:
        folder.mkdir(parents=True)
        if self.runtime == "torch":
            form("torch").save(model, folder)
        else:
            empty: list = []
            task = Task(
                train=empty, validation=empty, calibration=empty, test=empty,
                example_inputs=torch.zeros(2, *shape), metric=top1_accuracy(),
            )  # fmt: skip
            lower.to_onnx(lower.trace(model, task), folder / "model.onnx")
        return Contender(folder, self.runtime, threads=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="keep one core busy, but while the truth is measured")
    parser.add_argument("--comparisons", type=int, default=COMPARISONS)
    options = parser.parse_args()
    settings = Measure()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        pairs = [Pair(name, root / str(i)) for i, name in enumerate(NETWORKS)]
        careful = replace(settings, replicas=TRUTH_REPLICAS, max_seconds=0.1)
        trials = run(pairs, careful, root / "truth", TRUTH_COMPARISONS * len(pairs), lambda pair: [pair.a, pair.b])
        truths = {pair.name: Truth.of([trial for trial in trials if trial.pair == pair.name]) for pair in pairs}
        begin, used = time.perf_counter(), time.process_time()
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
        try:
            same = run(pairs, settings, root / "aa", options.comparisons, lambda pair: [pair.a, pair.a])
            more = run(pairs, settings, root / "ab", options.comparisons, lambda pair: [pair.a, pair.b])
            parent = (time.process_time() - used) / (time.perf_counter() - begin)
        finally:
            if neighbour:
                neighbour.kill()
                neighbour.wait()
    print(f"20 % more work: time of the copy / time of the network. {describe_machine()}\n")
    columns = (
        "network|ms|truth [95 %]|shared sd|A/A claims|A/A largest|A/B slower|A/B hold truth|widest|noisy|s each".split(
            "|"
        )
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for pair in pairs:
        print(row(pair, truths[pair.name], same, more, settings.margin))
    aa, ab = ([trial for trial in trials if trial.ratio] for trials in (same, more))
    claims = sum(trial.ratio.verdict(settings.margin) != "same" for trial in aa)
    slower = sum(trial.ratio.verdict(settings.margin) == "faster" for trial in ab)  # the network than its copy
    holding = sum(trial.holds(truths[trial.pair].value) for trial in ab)
    print(f"\nA/A: {claims} of {len(aa)} claim a difference.")
    print(f"The parent used {parent:.1%} of one core meanwhile.")
    print(f"A/B: {slower} of {len(ab)} say slower, {holding} hold the truth.")
    return 0 if claims <= 1 and slower == len(ab) and holding >= 0.9 * len(ab) else 1


@dataclass(frozen=True)
class Trial:
    """One comparison; no ratio where the machine was called too noisy."""

    pair: str
    ratio: Ratio | None
    ms: float
    seconds: float

    def holds(self, truth: float) -> bool:
        return self.ratio is not None and self.ratio.ci95[0] <= truth <= self.ratio.ci95[1]


@dataclass(frozen=True)
class Truth:
    """The mean of several comparisons, with Student's interval over them."""

    value: float
    ci95: tuple[float, float]
    shared_sd: float  # what comparisons differ by beyond what their own processes explain, relative
    ms: float

    @classmethod
    def of(cls, trials: list[Trial]) -> Truth:
        ratios = [trial.ratio for trial in trials if trial.ratio]
        logs = np.log([ratio.value for ratio in ratios])
        explained = np.mean([np.var(np.log(ratio.each), ddof=1) / len(ratio.each) for ratio in ratios])
        half = stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / math.sqrt(len(logs))
        return cls(
            math.exp(logs.mean()),
            (math.exp(logs.mean() - half), math.exp(logs.mean() + half)),
            math.sqrt(max(0.0, logs.var(ddof=1) - explained)),
            float(np.median([trial.ms for trial in trials])),
        )


def run(
    pairs: list[Pair], settings: Measure, logs: Path, count: int, team: Callable[[Pair], list[Contender]]
) -> list[Trial]:
    """`count` comparisons, in turns over the networks, each with nurseries of its own."""
    found = []
    for number in range(count):
        pair = pairs[number % len(pairs)]
        begin = time.perf_counter()
        ratio = None
        with Bench(settings, logs / str(number)) as bench:
            (comparison,) = bench.compare(team(pair), [pair.batch])
        if comparison.problem:
            print(comparison.problem, file=sys.stderr)
        else:
            ratio = comparison.ratio(0, 1)
        ms = float(np.median(comparison.milliseconds(0)))
        found.append(Trial(pair.name, ratio, ms, time.perf_counter() - begin))
    return found


def row(pair: Pair, truth: Truth, same: list[Trial], more: list[Trial], margin: float) -> str:
    """A line of the table."""
    aa, ab = ([trial for trial in trials if trial.pair == pair.name] for trials in (same, more))
    both = [*aa, *ab]
    ratios = [trial.ratio for trial in aa if trial.ratio]
    largest = max((math.exp(abs(math.log(found.value))) - 1 for found in ratios), default=math.nan)
    cells = (
        pair.name,
        f"{truth.ms:.3f}",
        f"{truth.value:.3f} [{truth.ci95[0]:.3f}, {truth.ci95[1]:.3f}]",
        f"{truth.shared_sd:.2%}",
        f"{sum(found.verdict(margin) != 'same' for found in ratios)} of {len(ratios)}",
        f"{largest:.1%}",
        f"{sum(t.ratio is not None and t.ratio.verdict(margin) == 'faster' for t in ab)} of {len(ab)}",
        f"{sum(t.holds(truth.value) for t in ab)} of {len(ab)}",
        f"{max((t.ratio.width for t in both if t.ratio), default=math.nan):.1%}",
        str(sum(t.ratio is None for t in both)),
        f"{np.mean([t.seconds for t in both]):.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def describe_machine() -> str:
    name, _ = cpu()
    return f"{name}, {usable_cores()} cores, 1 thread."


if __name__ == "__main__":
    sys.exit(main())

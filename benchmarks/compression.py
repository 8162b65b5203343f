"""What does each way to compress cost in quality, and what does it gain in size and latency?

    python benchmarks/compression.py                       # everything: about 80 minutes on 2 cores
    python benchmarks/compression.py --task docstrings --seeds 0 --only static dynamic
    python benchmarks/compression.py --table               # the tables of what was run before, at once

Every option is run on reference networks that were trained from three seeds, on both reference tasks. Quality is
pooled over the seeds: the differences to the network as it came in, on the same test samples, with Tango's interval of
a single test split, as if the three networks erred on the same samples: that is as wide as it can be.
Latency is that of the exported file against the unoptimised export of the same network, paired, one thread, batch 1;
its mean and interval (Student) are over the seeds. What was finished is kept in outputs/benchmarks/compression, and
not run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import shutil
import sys
import tempfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from scipy import stats
from torch import nn

from optpipe import registry
from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.fingerprint import environment
from optpipe.forms import ExportedFile
from optpipe.forms.exported import EXPORTED
from optpipe.lower import to_onnx, trace
from optpipe.machine import machine_lock, usable_cores
from optpipe.measure import quality
from optpipe.measure.latency import Bench, Contender
from optpipe.measure.measurer import Measurer
from optpipe.measure.settings import Measure
from optpipe.predictions import Predictions
from optpipe.progress import say
from optpipe.target import Target
from optpipe.task import Task, batch_of
from optpipe.zoo import digits, docstrings

RESULTS = Path("outputs/benchmarks/compression")
TARGET = Target(threads=1)
MEASURE = Measure(replicas=5, max_seconds=2.0)
SEEDS = (0, 1, 2)
TASKS: dict[str, ModuleType] = {"digits": digits, "docstrings": docstrings}
# epochs and learning rate that recover each network after pruning
RECOVERY: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 8, "learning_rate": 3e-3},
    "docstrings": {"epochs": 4, "learning_rate": 1e-3},
}
LONGER: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 16, "learning_rate": 3e-3},
    "docstrings": {"epochs": 16, "learning_rate": 1e-3},
}
TUNING: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 3, "learning_rate": 1e-3},
    "docstrings": {"epochs": 2, "learning_rate": 3e-4},
}
QAT: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 2, "learning_rate": 1e-4},
    "docstrings": {"epochs": 2, "learning_rate": 5e-5},
}
# of optpipe, that decide what becomes of a model
MODULES = ("target", "lower", "rewrite", "operators", "training", "held_out", "average", "schedule", "imitation")
HALF_A_POINT = 0.005  # of accuracy
SIMULATED = "simulated"  # options whose size is one that no runtime has


@dataclass(frozen=True)
class Option:
    """A chain of stages, each with its settings."""

    name: str
    stages: tuple[tuple[str, dict[str, Any]], ...]
    family: str


@dataclass
class Result:
    """What one option made of one network."""

    size_bytes: int = 0
    compressed_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    made_by: str = ""  # settings of the stages, code and versions
    measured_on: str = ""  # processor, instruction set and versions
    ratio: float = 0.0  # time of the unoptimised export / time of this; 0 where it was not timed
    ratio_ci95: tuple[float, float] = (0.0, 0.0)
    p50_ms: float = 0.0


def options(task: str) -> list[Option]:
    recovery = ("distill/logits", RECOVERY[task])
    tuning = ("distill/logits", TUNING[task])
    keep_norm = ("simplify/standard", {"fold_batch_norm": False})
    channels = ("prune/channels", {"ratio": 0.5, "round_to": 16})
    quarter, longer = ("prune/channels", {"ratio": 0.25, "round_to": 16}), ("distill/logits", LONGER[task])
    static = ("quantize/static", {})
    found = [
        Option("fp32", (("simplify/standard", {}),), "none"),
        Option("static", (static,), "quantize"),
        *(
            Option(f"static, {observer}", (("quantize/static", {"observer": observer}),), "quantize")
            for observer in ("minmax", "moving_average", "percentile", "mse")
        ),
        Option("static, per tensor", (("quantize/static", {"weights": "per_tensor"}),), "quantize"),
        Option("static, symmetric", (("quantize/static", {"activations": "symmetric"}),), "quantize"),
        Option("mixed", (("quantize/mixed", {"max_drop": 0.0}),), "quantize"),
        Option("qat", (keep_norm, ("quantize/qat", QAT[task])), "quantize"),
        Option("dynamic", (("quantize/dynamic", {}),), "quantize"),
        Option("weight only, int8", (("quantize/weight_only", {"bits": 8}),), "quantize"),
        Option("weight only, int4 of 32", (("quantize/weight_only", {"bits": 4, "group_size": 32}),), "quantize"),
        Option("half, fp16", (("quantize/half", {"dtype": "fp16"}),), "quantize"),
        Option("half, bf16", (("quantize/half", {"dtype": "bf16"}),), "quantize"),
        *(
            Option(
                f"{scheme}, {bits} bits per {part}",
                (("quantize/simulated", {"scheme": scheme, "bits": bits, "granularity": part}),),
                SIMULATED,
            )
            for scheme, bits, part in [
                ("uniform", 8, "channel"), ("uniform", 4, "channel"), ("uniform", 4, "group"), ("uniform", 4, "tensor"),
                ("uniform", 3, "group"), ("uniform", 2, "group"), ("logarithmic", 4, "channel"),
            ]
        ),
        Option("magnitude 50 %", (("prune/magnitude", {"sparsity": 0.5}),), "prune"),
        Option("gradient 50 %", (("prune/gradient", {"sparsity": 0.5}),), "prune"),
        Option("2:4", (("prune/nm", {}),), "prune"),
        Option("magnitude 80 % + distill", (("prune/magnitude", {"sparsity": 0.8}), tuning), "prune"),
        Option("2:4 + distill", (("prune/nm", {}), tuning), "prune"),
        *(
            Option(
                f"channels 50 %, {importance} + distill",
                (keep_norm, ("prune/channels", {**channels[1], "importance": importance}), recovery), "prune",
            )
            for importance in ("norm", "taylor", "hessian")
        ),
        Option("low rank 50 % + distill", (("prune/low_rank", {"budget": 0.5}), tuning), "prune"),
        Option("channels 50 % + finetune", (keep_norm, channels, ("distill/finetune", RECOVERY[task])), "distill"),
        Option("channels 50 % + features", (keep_norm, channels, ("distill/features", RECOVERY[task])), "distill"),
        Option("channels 50 % + distill + static", (keep_norm, channels, recovery, static), "stack"),
        Option("channels 50 % + longer distill + static", (keep_norm, channels, longer, static), "stack"),
        Option("channels 25 % + longer distill + static", (keep_norm, quarter, longer, static), "stack"),
        Option("channels 50 % + distill + qat", (keep_norm, channels, recovery, ("quantize/qat", QAT[task])), "stack"),
    ]  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), action="append", help="by default both")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--only", nargs="*", help="names of options")
    parser.add_argument("--skip-timing", action="store_true", help="leave it to a later call, on a quiet machine")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help="a file to write the tables to as well")
    asked = parser.parse_args()
    registry.load_stages()
    torch.set_num_threads(usable_cores())
    tasks = asked.task or list(TASKS)
    if not asked.table:
        for seed in asked.seeds:
            for task in tasks:
                run(task, seed, asked.only, timed=not asked.skip_timing)
    text = "\n\n".join([where(tasks, asked.seeds), *(tables(task, asked.seeds) for task in tasks)])
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")
    return int("BROKEN" in text)


def run(name: str, seed: int, only: list[str] | None, *, timed: bool) -> None:
    """Run every option on the network of one seed that has not been run before, then time all of them."""
    task: Task = TASKS[name].task()
    baseline: nn.Module = TASKS[name].trained(seed)
    chosen = [option for option in options(name) if only is None or option.name in only]
    origin = folder_of(name, seed, "baseline")
    with tempfile.TemporaryDirectory() as scratch, Bench(MEASURE, Path(scratch) / "workers") as bench:
        if not (origin / "result.json").exists():
            with machine_lock().working():
                export(copy.deepcopy(baseline), task, origin, rewrite=False)
                keep(origin, Result(size_bytes=EXPORTED["onnx"].size_bytes(origin)), task.predict(baseline, "test"))
        for option in chosen:
            folder = folder_of(name, seed, option.name)
            if (folder / "result.json").exists() and read(folder).made_by == made_by(option):
                continue
            say(f"{name}, seed {seed}: {option.name}")
            measurer = Measurer(task, TARGET, MEASURE, Path(scratch), bench)
            with machine_lock().working():
                result, predictions = compress(option, baseline, task, folder, seed, measurer)
            keep(folder, result, predictions)
        if timed:
            time(name, seed, chosen, task, bench)


def compress(
    option: Option, baseline: nn.Module, task: Task, folder: Path, seed: int, measurer: Measurer
) -> tuple[Result, Predictions | None]:
    """Take `baseline` through the stages of `option` and export the result to `folder`."""
    result, model = Result(made_by=made_by(option), measured_on=this_machine()), copy.deepcopy(baseline)
    try:
        for stage, settings in option.stages:
            torch.manual_seed(seed)
            ctx = Context(
                dir=fresh(folder / stage.replace("/", "_")), task=task, target=TARGET, baseline=baseline, device="cpu",
                seed=seed, measurer=measurer,
            )  # fmt: skip
            model = made(stage, settings).run(model, ctx)
            result.notes += ctx.notes
            result.facts |= ctx.facts
        exported = export(model, task, folder)
    except StageError as error:
        result.failed = str(error)
        return result, None
    result.size_bytes = EXPORTED["onnx"].size_bytes(folder)
    result.compressed_bytes = len(zlib.compress((folder / EXPORTED["onnx"].FILE).read_bytes(), 6))
    return result, task.predict(EXPORTED["onnx"].as_callable(exported), "test")


def time(name: str, seed: int, chosen: list[Option], task: Task, bench: Bench) -> None:
    """Time what has not been timed: the exported file against the unoptimised export, at batch 1."""
    origin = folder_of(name, seed, "baseline")
    inputs, _ = next(iter(task.validation))
    batch: Any = batch_of(inputs, 1)
    np.savez(origin / "inputs.npz", **{"0": batch.numpy()})
    for option in chosen:
        folder = folder_of(name, seed, option.name)
        result = read(folder)
        if result.failed or result.ratio or option.family == SIMULATED:
            continue
        say(f"timing {name}, seed {seed}: {option.name}")
        team = [Contender(path, TARGET.runtime, TARGET.threads) for path in (folder, origin)]
        comparison = bench.compare(team, [origin / "inputs.npz"])[0]
        if comparison.problem:
            say(comparison.problem)
            continue
        ratio = comparison.ratio(0, 1)
        result.ratio, result.ratio_ci95 = ratio.value, ratio.ci95
        result.measured_on = this_machine()
        result.p50_ms = float(np.median(comparison.milliseconds(0)))
        write(folder, result)


def made_by(option: Option) -> str:
    """What a result of this option depends on, beside the network and its data: stages, their code, versions."""
    packages = {stage.partition("/")[0] for stage, _ in option.stages}
    sources = [path for package in packages for path in sorted(Path("stages").glob(f"{package}*/**/*.py"))]
    sources += [Path("optpipe") / f"{name}.py" for name in MODULES]
    digest = hashlib.sha256(repr((option.stages, environment()["versions"])).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def made(stage: str, settings: dict[str, Any]) -> Any:
    """The stage of that name with these settings, as a configuration would make it."""
    cls = next(info.cls for info in registry.stages() if info.name == stage)
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), settings))


def export(model: Any, task: Task, folder: Path, *, rewrite: bool = True) -> ExportedFile:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EXPORTED["onnx"].FILE
    return to_onnx(trace(model, task), path, input_names=task.input_names, rewrite=rewrite)


# What was found, on the disk.


def folder_of(task: str, seed: int, option: str) -> Path:
    plain = "".join(letter if letter.isalnum() else "_" for letter in option)
    return RESULTS / task / str(seed) / plain


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def keep(folder: Path, result: Result, predictions: Predictions | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if predictions is not None:
        np.savez(folder / "scores.npz", scores=predictions.scores)
    write(folder, result)


def write(folder: Path, result: Result) -> None:
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1, default=str))


def read(folder: Path) -> Result:
    return Result(**json.loads((folder / "result.json").read_text()))


# Tables.


def this_machine() -> str:
    machine = environment()
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return f"{machine['cpu']} ({TARGET.int8_instructions().value}), {TARGET.threads} thread; {versions}."


def where(tasks: list[str], seeds: list[int]) -> str:
    """Where the results of the tables were measured, each place once."""
    every = [result for task in tasks for option in options(task) for result in finished(task, seeds, option).values()]
    return "\n".join(dict.fromkeys(result.measured_on for result in every))


def tables(task: str, seeds: list[int]) -> str:
    header = [
        "option", "seeds", "accuracy", "Δ points, pooled [95 %]", "KB", "compressed KB", "× same runtime [95 %]",
    ]  # fmt: skip
    rows = [row for option in options(task) if (row := row_of(task, seeds, option))]
    best = ", ".join(front(task, seeds))
    asked = [f"- {bar}" for bar in bars(task, seeds)]
    front_said = f"Not beaten in both accuracy and latency by another: {best}."
    return "\n".join([f"### {task}", "", *markdown(header, rows), "", front_said, "", *asked])


def bars(task: str, seeds: list[int]) -> list[str]:
    """What is asked of these options, and whether it holds; by the estimates, with their intervals."""
    channels = "channels 50 %, norm + distill"
    asked = [
        ("static", "baseline", -0.003, "static loses at most 0.3 points"),
        ("qat", "static", 0.0, "qat is at least as good as static"),
    ]
    if task == "digits":
        asked.append((channels, "baseline", -0.005, "50 % of the channels lose at most 0.5 points"))
    found = []
    for option, against, least, said in asked:
        done = [seed for seed in seeds if is_done(task, seed, option) and is_done(task, seed, against)]
        if done:
            judged = pooled(task, done, option, against)
            low, high = (100 * bound for bound in judged.ci95)
            holds = "holds" if judged.delta >= least else "BROKEN"
            found.append(f"{said}: {holds}, {100 * judged.delta:+.2f} [{low:+.2f}, {high:+.2f}], {len(done)} seeds")
    speeds = {option.name: ratio_of(list(finished(task, seeds, option).values())) for option in options(task)}
    if task == "docstrings" and speeds["static"] != "–":
        holds = "holds" if float(speeds["static"].split()[0]) >= 2 else "BROKEN"
        found.append(f"static is at least 2 × as fast in the same runtime: {holds}, {speeds['static']}")
    return [*found, *stack_bar(task, seeds)]


def stack_bar(task: str, seeds: list[int]) -> list[str]:
    """Whether a stack beats the best single method: the fastest of those that lose at most half a point.

    It must be faster by the whole interval over the seeds, and as accurate as far as the paired interval tells.
    """
    logs: dict[str, NDArray[Any]] = {}  # of each seed's ratio
    families = {option.name: option.family for option in options(task)}
    for option in options(task):
        done = finished(task, seeds, option)
        if len(done) == len(seeds) and all(result.ratio for result in done.values()):
            logs[option.name] = np.log([result.ratio for result in done.values()])
    singles = [
        name for name in logs
        if families[name] not in ("stack", "none") and pooled(task, seeds, name).delta >= -HALF_A_POINT
    ]  # fmt: skip
    stacks = [name for name in logs if families[name] == "stack"]
    if not singles or not stacks or len(seeds) < 2:
        return []
    best = max(singles, key=lambda name: float(logs[name].mean()))
    found, holds = [], False
    for stack in stacks:
        against = logs[stack] - logs[best]
        half = stats.t.ppf(0.975, len(against) - 1) * stats.sem(against)
        low, middle, high = np.exp([against.mean() - half, against.mean(), against.mean() + half])
        judged = pooled(task, seeds, stack, best)
        holds |= bool(low > 1 and judged.ci95[1] >= 0)
        found.append(
            f"{stack}: {middle:.2f} × [{low:.2f}, {high:.2f}], {100 * judged.delta:+.2f} points "
            f"[{100 * judged.ci95[0]:+.2f}, {100 * judged.ci95[1]:+.2f}]"
        )
    said = "a stack is faster than the best single method and as accurate"
    return [f"{said} ({best}): {'holds' if holds else 'BROKEN'}; {'; '.join(found)}"]


def is_done(task: str, seed: int, option: str) -> bool:
    return (folder_of(task, seed, option) / "scores.npz").exists()


def front(task: str, seeds: list[int]) -> list[str]:
    """The options that no other beats in both pooled accuracy and latency, the fastest last; by their estimates."""
    points = []
    for option in options(task):
        done = finished(task, seeds, option)
        if done and all(result.ratio for result in done.values()):
            speed = float(np.mean([math.log(result.ratio) for result in done.values()]))
            points.append((speed, pooled(task, list(done), option.name).value, option.name))
    kept = [
        point for point in points
        if not any(other[0] >= point[0] and other[1] >= point[1] and other[:2] != point[:2] for other in points)
    ]  # fmt: skip
    return [name for *_, name in sorted(kept)]


def finished(task: str, seeds: list[int], option: Option) -> dict[int, Result]:
    """What the option made of each seed's network, where that was run."""
    folders = {seed: folder_of(task, seed, option.name) for seed in seeds}
    return {seed: read(folder) for seed, folder in folders.items() if (folder / "result.json").exists()}


def row_of(task: str, seeds: list[int], option: Option) -> list[str] | None:
    done = finished(task, seeds, option)
    if not done:
        return None
    failed = next((result.failed for result in done.values() if result.failed), "")
    if failed:
        return [option.name, str(len(done)), "refused", failed.splitlines()[0], "", "", ""]
    judged = pooled(task, list(done), option.name)
    low, high = judged.ci95
    sizes = [result.size_bytes for result in done.values()]
    packed = [result.compressed_bytes for result in done.values()]
    size, compressed = f"{np.mean(sizes) / 1000:.1f}", f"{np.mean(packed) / 1000:.1f}"
    if option.family == SIMULATED:
        simulated = np.mean([result.facts["simulated_packed_bytes"] for result in done.values()])
        size, compressed = f"{simulated / 1000:.1f} simulated", "–"
    delta = f"{100 * judged.delta:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
    ratio = ratio_of(list(done.values()))
    return [option.name, str(len(done)), f"{judged.value:.2%}", delta, size, compressed, ratio]


@dataclass(frozen=True)
class Pooled:
    """Accuracy over the seeds, and the difference to what each is held against, as fractions."""

    value: float
    delta: float
    ci95: tuple[float, float]


def pooled(task: str, seeds: list[int], option: str, against: str = "baseline") -> Pooled:
    """The option on all seeds' networks, each against another option on its own network."""
    ours, theirs = (
        np.stack([np.load(folder_of(task, seed, name) / "scores.npz")["scores"] for seed in seeds])
        for name in (option, against)
    )
    gained, lost = (ours > theirs).mean(0).sum(), (ours < theirs).mean(0).sum()  # samples, mean over the seeds
    interval = quality.tango_interval(gained, lost, ours.shape[1])
    return Pooled(float(ours.mean()), float((ours - theirs).mean()), interval)


def ratio_of(results: list[Result]) -> str:
    """Geometric mean over the seeds, and Student's interval; of a single seed, the interval of its comparison."""
    logs = [math.log(result.ratio) for result in results if result.ratio]
    if not logs:
        return "–"
    if len(logs) == 1:
        low, high = next(result.ratio_ci95 for result in results if result.ratio)
    else:
        half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
        low, high = math.exp(np.mean(logs) - half), math.exp(np.mean(logs) + half)
    return f"{math.exp(np.mean(logs)):.2f} [{low:.2f}, {high:.2f}]"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows]]


if __name__ == "__main__":
    sys.exit(main())

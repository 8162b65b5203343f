"""Does the report name the true cause? Networks that int8 slows down, or hardly helps, each for a reason of its own.

    python benchmarks/why_not_faster.py       # about 2 minutes

A cause is proved by taking it away: the same network without it must gain more from int8. Ratios are paired, int8
against fp32 in ONNX Runtime, with the settings of `measure=default`. Exits with 1 if a first cause is not the true one
or its removal does not help.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from optpipe import lower
from optpipe.context import Context
from optpipe.machine import cpu, usable_cores
from optpipe.measure.explain import explain
from optpipe.measure.inspect import inspect
from optpipe.measure.latency import Bench, Contender
from optpipe.measure.measurer import Measurer
from optpipe.measure.settings import Measure
from optpipe.measure.statistics import Ratio
from optpipe.progress import quiet
from optpipe.report.schema import Finding
from optpipe.stages.quantize.static import Static
from optpipe.target import Target
from optpipe.task import Task, top1_accuracy

Shape = tuple[int, ...]


def repeated(count: int, *layers: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(*(layer() for _ in range(count) for layer in layers))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def token_layers(*between: Callable[[], nn.Module]) -> nn.Module:
    return repeated(4, lambda: nn.Linear(64, 64), *between)


def convolutions(channels: int, groups: int = 1, kernel: int = 3, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return repeated(
        6, lambda: nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups), lambda: activation()
    )


class Turned(nn.Module):
    """Convolutions over the two axes of an image in turn."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 1) for _ in range(6))
        self.turns = turns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
            x = x.transpose(2, 3) if self.turns else x
        return x


@dataclass(frozen=True)
class Case:
    """A network with a cause, and the same without it."""

    name: str
    cause: str
    shape: Shape
    network: Callable[[], nn.Module]
    without: str
    network_without: Callable[[], nn.Module]
    shape_without: Shape | None = None  # where it is another
    signed: bool = False  # quantised by onnxruntime's own quantiser, S8S8; U8S8 without the cause


CASES = [
    Case("2 linear layers of 8", "call_overhead", (8,), lambda: mlp(8), "512 wide", lambda: mlp(512), (512,)),
    Case(
        "linear, layer norm, gelu", "float_operators", (64, 64),
        lambda: token_layers(lambda: nn.LayerNorm(64), nn.GELU), "relu instead", lambda: token_layers(nn.ReLU),
    ),
    Case(
        "1×1 convolutions, hard sigmoid", "unfused_qdq", (16, 48, 48),
        lambda: convolutions(16, kernel=1, activation=nn.Hardsigmoid),
        "relu instead", lambda: convolutions(16, kernel=1),
    ),
    Case(
        "convolutions, onnxruntime S8S8", "missing_instructions", (32, 28, 28), lambda: convolutions(32),
        "U8S8", lambda: convolutions(32), signed=True,
    ),
    Case(
        "convolutions of 4 channels", "channels_off_vector_width", (4, 48, 48), lambda: convolutions(4),
        "16 channels", lambda: convolutions(16), (16, 48, 48),
    ),
    Case(
        "1×1 convolutions, transposes", "layout_conversions", (32, 32, 32), lambda: Turned(True),
        "no transposes", lambda: Turned(False),
    ),
    Case(
        "depthwise convolutions", "slower_kernels", (64, 28, 28), lambda: convolutions(64, groups=64),
        "dense", lambda: convolutions(64),
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """What was measured and found out of one network."""

    ms: float
    ratio: Ratio
    problem: str
    findings: list[Finding]


class Inputs(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data as onnxruntime's quantiser reads it."""

    def __init__(self, name: str, task: Task) -> None:
        self._batches = iter([{name: inputs.numpy()} for inputs, _ in task.calibration])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def task_of(shape: Shape) -> Task:
    torch.manual_seed(0)
    data = [(torch.randn(8, *shape), torch.zeros(8, dtype=torch.long)) for _ in range(2)]
    return Task(
        train=data, validation=data, calibration=data, test=data, example_inputs=data[0][0][:2],
        input_names=["input"], metric=top1_accuracy(),
    )  # fmt: skip


def saved(network: nn.Module, shape: Shape, folder: Path, bench: Bench, signed: bool | None) -> tuple[Path, Path, Path]:
    """The folders of the network in int8 and in fp32, and the batch that is timed.

    signed: None quantises with optpipe's stage, else onnxruntime's own quantiser with activations of that kind.
    """
    task, network = task_of(shape), network.eval()
    int8, fp32, batch = folder / "int8", folder / "fp32", folder / "batch.npz"
    for made in (int8, fp32):
        made.mkdir(parents=True)
    np.savez(batch, **{"0": task.example_inputs[:1].numpy()})
    lower.to_onnx(lower.trace(network, task), fp32 / "model.onnx", input_names=["input"], rewrite=False)
    if signed is None:
        measurer = Measurer(task, Target(), bench.settings, folder, bench)
        context = Context(
            dir=folder, task=task, target=Target(), baseline=network, device="cpu", seed=0, measurer=measurer
        )
        quantised = Static().run(network, context)
        lower.to_onnx(lower.trace(quantised, task), int8 / "model.onnx", input_names=["input"])
        return int8, fp32, batch
    with quiet("root"):  # which recommends to preprocess
        quantize_static(
            fp32 / "model.onnx", int8 / "model.onnx", Inputs("input", task), per_channel=True,
            quant_format=QuantFormat.QOperator, weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        )  # fmt: skip
    return int8, fp32, batch


def look(network: nn.Module, shape: Shape, folder: Path, bench: Bench, signed: bool | None) -> Seen:
    """Time a network in int8 against itself in fp32, and have it explained."""
    int8, fp32, batch = saved(network, shape, folder, bench, signed)
    team = [Contender(made, "onnxruntime", 1) for made in (int8, fp32)]
    (comparison,) = bench.compare(team, [batch])
    seen, baseline = (inspect(made / "model.onnx", batch, 1) for made in (int8, fp32))
    ms = float(np.median(comparison.milliseconds(0)))
    return Seen(ms, comparison.ratio(0, 1), comparison.problem, explain(seen, baseline))


def main() -> int:
    rows, evidence, wrong = [], [], []
    with tempfile.TemporaryDirectory() as name, Bench(Measure(), Path(name) / "logs") as bench:
        for number, case in enumerate(CASES):
            torch.manual_seed(number)
            folder = Path(name) / str(number)
            signed = (True, False) if case.signed else (None, None)
            seen = look(case.network(), case.shape, folder / "with", bench, signed[0])
            shape = case.shape_without or case.shape
            other = look(case.network_without(), shape, folder / "without", bench, signed[1])
            first = seen.findings[0] if seen.findings else None
            named = f"{first.cause} ({first.share:.0%})" if first else "nothing"
            if first is None or first.cause != case.cause:
                wrong.append(f"{case.name}: names {named}, the cause is {case.cause}")
            if seen.ratio.verdict(bench.settings.margin) == "faster":
                wrong.append(f"{case.name}: int8 is faster; there is nothing to explain")
            if seen.ratio.ci95[1] >= other.ratio.ci95[0]:
                wrong.append(f"{case.name}: '{case.without}' does not help")
            wrong += [f"{case.name}: {one.problem}" for one in (seen, other) if one.problem]
            rows.append([case.name, f"{seen.ms:.3f}", told(seen.ratio), named, case.without, told(other.ratio)])
            evidence += [f"\n{case.name}"]
            evidence += [f"  {f.cause}, {f.share:.0%}: {f.evidence}. {f.remedy}" for f in seen.findings]
    print(f"fp32 / int8 in ONNX Runtime, above 1 int8 is faster. {cpu()[0]}, {usable_cores()} cores, 1 thread.\n")
    columns = ["network", "int8 ms", "fp32 / int8 [95 %]", "named first", "without it", "fp32 / int8 [95 %]"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    print("\n".join(evidence))
    print("\n" + ("\n".join(wrong) if wrong else f"{len(CASES)} of {len(CASES)} causes named and proved."))
    return 1 if wrong else 0


def told(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} [{ratio.ci95[0]:.2f}, {ratio.ci95[1]:.2f}]"


if __name__ == "__main__":
    sys.exit(main())

"""Networks that break naive tools, each through channels, static int8, export and ONNX Runtime.

    python benchmarks/breaking.py [--only NAME …] [--output FILE]

Prints a Markdown table, and ends with 1 if a network ends in something else than a file that computes what the
quantised model does, or a reason that names the layer. The networks are those of tests/networks.py, each trained for
a few seconds on a made-up task, before and after its channels are halved: int8 means little on random weights.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from networks import IMAGE, NETWORKS, TOKENS, VOCABULARY, example

from optpipe import parity
from optpipe.context import Context
from optpipe.errors import StageError, named_reason
from optpipe.forms import ExportedFile
from optpipe.forms.exported import EXPORTED
from optpipe.lower import to_onnx, trace
from optpipe.progress import say
from optpipe.runtimes.onnxruntime import session_options
from optpipe.stages.export import Onnx  # type: ignore[import-not-found]
from optpipe.stages.prune.channels import Channels  # type: ignore[import-not-found]
from optpipe.stages.quantize.static import Static  # type: ignore[import-not-found]
from optpipe.stages.trace import Program  # type: ignore[import-not-found]
from optpipe.target import Target
from optpipe.task import Task, top1_accuracy

BATCH, BATCHES, CLASSES = 32, 24, 4
EPOCHS, LEARNING_RATE = 4, 3e-3
NAMED = r"'[\w.]+'"  # a layer in a reason
INTEGER = {
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "QAttention",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
}  # fmt: skip
FLOAT = {
    "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
    "TransposeMatMul", "LSTM", "GRU", "RNN", "Attention", "MultiHeadAttention", "Einsum",
}  # fmt: skip


@dataclass
class Row:
    """What became of one network."""

    name: str
    kept: str = "–"
    operators: str = "–"
    export: str = "–"
    parity: str = "–"
    accuracy: str = "–"
    kilobytes: str = "–"
    reasons: list[str] = field(default_factory=list)
    broken: str = ""  # what it ended in, if that is neither success nor a reason

    def cells(self) -> list[str]:
        return [self.name, self.kept, self.operators, self.export, self.parity, self.accuracy, self.kilobytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.only:
        say(name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(carry_through(name, Path(folder)))
    text = report(rows)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    sys.exit(any(row.broken for row in rows))


def carry_through(name: str, folder: Path) -> Row:
    """Train, prune, train again, quantise, trace, export and run one network."""
    torch.manual_seed(0)
    model, task, row = NETWORKS[name](), made_up(name), Row(name)
    try:
        train(model, task)
        pruned = prune(copy.deepcopy(model), task, folder, row)
        train(pruned, task)
        quantise(model, pruned, task, folder, row)
    except StageError as error:
        row.export = "no"
        if re.search(NAMED, str(error)):
            row.reasons.append(str(error))
        else:
            row.broken = str(error)
    except Exception as error:  # whatever it is, the table says so and the command ends with 1
        row.export, row.broken = "broken", named_reason(error)
    return row


def prune(model: nn.Module, task: Task, folder: Path, row: Row) -> nn.Module:
    ctx = context(model, task, folder)
    try:
        pruned: nn.Module = Channels(ratio=0.5, round_to=4).run(model, ctx)
    except StageError as error:
        row.kept = "all"
        row.reasons.append(str(error))
        return model
    row.kept = f"{ctx.facts['channels_kept']:.0%}"
    row.reasons += [note for note in ctx.notes if "stays as it is" in note]
    return pruned


def quantise(model: nn.Module, pruned: nn.Module, task: Task, folder: Path, row: Row) -> None:
    ctx = context(model, task, folder)
    plain = to_onnx(trace(copy.deepcopy(model), task), folder / "plain.onnx")
    float_accuracy = float(task.evaluate(pruned.eval(), "validation").mean())
    quantised = Static().run(pruned, ctx)
    row.reasons += [note for note in ctx.notes if "stays in float:" in note]
    exported = Onnx().run(Program().run(quantised, ctx), ctx)
    row.export = "yes"
    operators = optimised(exported, folder)
    integer = sum(operators[kind] for kind in INTEGER)
    others = {kind: operators[kind] for kind in sorted(FLOAT) if operators[kind]}
    row.operators = f"{integer} of {integer + sum(others.values())}"
    if others:
        row.operators += f" ({', '.join(f'{n} {kind}' for kind, n in others.items())})"
    run = EXPORTED["onnx"].as_callable(exported)
    found = parity.check(quantised, run, task, precision="int8")
    row.parity = f"{found.max_error:.1e}, {found.label_flips} of {found.n}"
    row.accuracy = f"{float_accuracy:.1%} → {float(task.evaluate(run, 'validation').mean()):.1%}"
    row.kilobytes = f"{plain.path.stat().st_size / 1e3:.1f} → {exported.path.stat().st_size / 1e3:.1f}"


def optimised(exported: ExportedFile, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def made_up(name: str) -> Task:
    """Images of a class's own pattern under noise, or tokens a third of which are a class's own."""
    generator = torch.Generator().manual_seed(0)
    inputs = example(name)
    make = images if inputs.is_floating_point() else tokens
    batches = [make(inputs.shape[1:], generator) for _ in range(BATCHES)]
    held = batches[-4:]
    return Task(
        train=batches[:-4], validation=held, calibration=batches[:4], test=held, example_inputs=batches[0][0][:2],
        metric=top1_accuracy(),
    )  # fmt: skip


def images(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    fixed = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, IMAGE[0], 1, 1, generator=fixed) + torch.randn(CLASSES, *IMAGE, generator=fixed)
    target = torch.randint(CLASSES, (BATCH,), generator=generator)
    return patterns[target] + 2 * torch.randn(BATCH, *shape, generator=generator), target


def tokens(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    of_class = (VOCABULARY - 1) // CLASSES
    target = torch.randint(CLASSES, (BATCH,), generator=generator)
    any_token = torch.randint(1, VOCABULARY, (BATCH, *shape), generator=generator)
    own = 1 + target[:, None] * of_class + torch.randint(of_class, (BATCH, *shape), generator=generator)
    return torch.where(torch.rand(BATCH, *shape, generator=generator) < 4 / TOKENS, own, any_token), target


def train(model: nn.Module, task: Task) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(EPOCHS):
        for inputs, target in task.train:
            optimizer.zero_grad()
            cross_entropy(model(inputs), target).backward()
            optimizer.step()
    model.eval()


def context(model: nn.Module, task: Task, folder: Path) -> Context:
    values: dict[str, Any] = {"measurer": None, "baseline": model}
    return Context(dir=folder, task=task, target=Target(), device="cpu", seed=0, **values)


def report(rows: list[Row]) -> str:
    heads = [
        "network", "channels kept", "int8 operators, of those with weights or products", "exported",
        "parity: largest difference, labels flipped", "accuracy, fp32 → int8", "KB, fp32 → int8",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    reasons = [f"- {row.name}: {reason}" for row in rows for reason in row.reasons]
    broken = [f"- BROKEN {row.name}: {row.broken}" for row in rows if row.broken]
    return "\n".join([*lines, "", *reasons, *broken])


if __name__ == "__main__":
    main()

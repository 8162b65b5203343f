"""What each way to train gives back to a network without 70 % of its channels: `python benchmarks/distilling.py`.

On digits, one seed, 10 epochs each; takes minutes. Then what a training step costs in each
precision, and what it remembers for the backward pass: fastest of several steps in turns, 1 thread, batch 32.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from optpipe.context import Context
from optpipe.recompute import recomputed
from optpipe.schedule import Precision
from optpipe.stages.distill import Features, Finetune, Logits
from optpipe.stages.prune.channels import Channels
from optpipe.target import Target
from optpipe.training import make_fabric
from optpipe.zoo import digits, docstrings

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
METHODS = {
    "none": None,
    "finetune": Finetune(),
    "finetune, learning_rate 3e-3": Finetune(learning_rate=3e-3),
    "logits": Logits(),
    "features, the middle block": Features(),
    "features, all three blocks": Features(hints=BLOCKS),
    "logits, bf16_mixed": Logits(precision=Precision.bf16_mixed),
    "logits, ema 0.98": Logits(ema=0.98),
}
WAYS: dict[str, tuple[Precision, list[str]]] = {
    "fp32": (Precision.fp32, []),
    "bf16_mixed": (Precision.bf16_mixed, []),
    "fp16_mixed": (Precision.fp16_mixed, []),
    "checkpointing=[blocks.*]": (Precision.fp32, ["blocks.*"]),
}


def main() -> None:
    print("| distill | s | validation | test | KL |\n|" + " --- |" * 5)
    for name, stage in METHODS.items():
        print(row(name, stage), flush=True)
    torch.set_num_threads(1)
    for network, task in ((digits.DigitsNet, digits.task()), (docstrings.TextEncoder, docstrings.task())):
        print(f"\n| {network.__name__} | ms | × fp32 | MB remembered |\n|" + " --- |" * 4)
        batch = next(iter(task.train))
        steps = {name: Step(network(), batch, *way) for name, way in WAYS.items()}
        times: dict[str, list[float]] = {name: [] for name in WAYS}
        for turn in range(10):
            for name, step in steps.items():
                if turn < 3 or name != "fp16_mixed":  # seconds each, where there is no fp16 arithmetic
                    times[name].append(step.seconds())
        for name, step in steps.items():
            best, fp32 = min(times[name]), min(times["fp32"])
            print(f"| {name} | {best * 1e3:.0f} | {best / fp32:.2f} | {step.remembered() / 1e6:.0f} |", flush=True)


class Step:
    """A training step of a network on one batch."""

    def __init__(self, model: nn.Module, batch: Any, precision: Precision, patterns: list[str]) -> None:
        self.model, (self.inputs, self.target), self.patterns = model.train(), batch, patterns
        self.fabric = make_fabric(torch.device("cpu"), precision)
        self.wrapped, self.optimizer = self.fabric.setup(model, torch.optim.AdamW(model.parameters(), 1e-4))

    def seconds(self) -> float:
        began = time.perf_counter()
        with recomputed(self.model, self.patterns):
            self.fabric.backward(cross_entropy(self.wrapped(self.inputs), self.target))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def remembered(self) -> int:
        """Bytes of activations that are kept between the forward and the backward pass."""
        weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with recomputed(self.model, self.patterns), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = cross_entropy(self.wrapped(self.inputs), self.target)
        del loss
        return sum(size for storage, size in kept.items() if storage not in weights)


def row(name: str, stage: Any) -> str:
    task, baseline = digits.task(), digits.trained()
    with tempfile.TemporaryDirectory() as folder:
        ctx = Context(
            dir=Path(folder), task=task, target=Target(), baseline=baseline, device="cpu", seed=0, measurer=None
        )  # type: ignore[arg-type]
        model = Channels(ratio=0.7).run(copy.deepcopy(baseline), ctx)
        torch.manual_seed(0)
        began = time.perf_counter()
        if stage:
            model = stage.run(model, ctx)
        seconds = time.perf_counter() - began
    accuracy = [f"{float(task.evaluate(model, split).mean()):.2%}" for split in ("validation", "test")]
    return f"| {name} | {seconds:.1f} | {' | '.join(accuracy)} | {divergence(model, baseline, task):.4f} |"


@torch.no_grad()
def divergence(model: nn.Module, baseline: nn.Module, task: Any) -> float:
    """Mean KL of the baseline's classes to the model's, on the test split."""
    parts = [
        kl_div(model(x).log_softmax(1), baseline(x).log_softmax(1), log_target=True, reduction="none").sum(1)
        for x, _ in task.test
    ]
    return float(torch.cat(parts).mean())


if __name__ == "__main__":
    main()

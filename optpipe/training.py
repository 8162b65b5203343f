"""The only training loop: distillation, fine-tuning and the zoo's baselines go through `fit`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from optpipe.errors import StageError
from optpipe.machine import usable_cores
from optpipe.progress import track
from optpipe.task import Batches, Inputs, call

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Loss = Callable[[Inputs, Any, Any], Tensor]  # of (inputs, outputs, target)
KEEPS_ZEROS = "keeps_zeros"  # attribute of a module: the names of its parameters whose zeros stay zero in training


@dataclass(kw_only=True)
class Schedule:
    """How long and how fast to train: AdamW, one cycle of learning rate with a warm-up (Smith & Topin 2019)."""

    epochs: int
    learning_rate: float
    weight_decay: float = 0.01
    patience: int = 0  # epochs without a better score before training stops; 0 trains them all


@dataclass
class History:
    """What happened in `fit`."""

    losses: list[float] = field(default_factory=list)  # mean of each epoch
    scores: list[float] = field(default_factory=list)  # of `judge` after each epoch
    best_epoch: int = 0  # counted from 1; the model was left as it was after this epoch

    @property
    def stopped_early(self) -> bool:
        return self.best_epoch < len(self.losses)


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    schedule: Schedule,
    *,
    fabric: Fabric | None = None,
    judge: Callable[[nn.Module], float] | None = None,
    description: str = "training",
) -> History:
    """Train `model` in place and leave it, in eval mode, as it was after its best epoch.

    judge: score of the model after an epoch, higher is better; without it the last epoch counts as the best.
    Raises StageError if a loss is not a finite number, or 0 throughout an epoch.
    """
    if fabric is None:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator="cpu", devices=1)
    torch.set_num_threads(usable_cores())
    optimizer = torch.optim.AdamW(model.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)
    steps = sum(1 for _ in batches)
    if not steps:
        raise StageError("the train split is empty; it must hold at least one batch")
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total_steps=schedule.epochs * steps)
    wrapped, optimizer = fabric.setup(model, optimizer)
    zero_again = kept_zeros(model)
    history, best = History(), copy.deepcopy(model.state_dict())
    epochs = range(1, schedule.epochs + 1)
    for epoch in epochs:
        model.train()
        total = 0.0
        for inputs, target in track(batches, f"{description}, epoch {epoch} of {schedule.epochs}", steps):
            inputs, target = fabric.to_device((inputs, target))
            value = loss(inputs, call(wrapped, inputs), target)
            if not torch.isfinite(value):
                raise StageError(
                    f"the loss became {value.item()} in epoch {epoch}; "
                    f"lower learning_rate (it is {schedule.learning_rate:g}) or look for NaN in the training data"
                )
            optimizer.zero_grad()
            fabric.backward(value)
            optimizer.step()
            zero_again()
            rate.step()
            total += value.item()
        history.losses.append(total / steps)
        if total == 0:
            raise StageError(
                f"the loss was 0 in every batch of epoch {epoch}, so nothing can be learned from it; give the task a "
                "loss that fits its outputs, for example Task(loss=torch.nn.functional.mse_loss) for a regression"
            )
        model.eval()
        history.scores.append(judge(model) if judge else -math.inf)
        if not judge or epoch == 1 or history.scores[-1] > history.scores[history.best_epoch - 1]:
            history.best_epoch, best = epoch, copy.deepcopy(model.state_dict())
        elif schedule.patience and epoch - history.best_epoch >= schedule.patience:
            break
    model.load_state_dict(best)
    model.to("cpu")
    return history


def kept_zeros(model: nn.Module) -> Callable[[], None]:
    """What sets the weights back to zero that a pruning stage made zero, to be called after every step of training."""
    pruned = [getattr(m, name) for m in model.modules() for name in getattr(m, KEEPS_ZEROS, ())]
    zeros = [(weight, weight == 0) for weight in pruned]

    def zero_again() -> None:
        with torch.no_grad():
            for weight, mask in zeros:
                weight.masked_fill_(mask, 0.0)

    return zero_again


def hold_out(batches: Batches, share: float, seed: int) -> tuple[Batches, Batches]:
    """Split training data in two, the second part about `share` of it.

    A DataLoader over a map-style dataset is split by samples. Any other iterable is split by the position of its
    batches, so it must yield the same batches in the same order every time.
    """
    if isinstance(batches, DataLoader) and hasattr(batches.dataset, "__len__"):
        order = torch.randperm(len(batches.dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(1, round(len(order) * share))
        shuffle = isinstance(batches.sampler, torch.utils.data.RandomSampler)
        return _part(batches, order[held:], shuffle), _part(batches, order[:held], False)
    every = max(2, min(round(1 / share), sum(1 for _ in batches)))
    return _Every(batches, every, held=False), _Every(batches, every, held=True)


def _part(loader: DataLoader[Any], indices: list[int], shuffle: bool) -> DataLoader[Any]:
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size or 1,
        shuffle=shuffle,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )


@dataclass(frozen=True)
class _Every:
    """Every n-th batch of `batches`, or all the others."""

    batches: Iterable[Any]
    n: int
    held: bool

    def __iter__(self) -> Any:
        return (batch for i, batch in enumerate(self.batches) if (i % self.n == self.n - 1) == self.held)

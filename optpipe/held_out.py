"""Training data that is not trained on: it picks the epoch that is kept, so that validation data need not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from optpipe.errors import StageError
from optpipe.task import Batches, call, size_of

if TYPE_CHECKING:
    from optpipe.training import Loss


@dataclass(frozen=True)
class HeldOutLoss:
    """A judge for `fit`: minus the mean loss on training data that is not trained on.

    Raises StageError if that is no number.
    """

    batches: Batches
    loss: Loss

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        from lightning_fabric.utilities import move_data_to_device

        device = next(iter(model.parameters()), torch.empty(0)).device
        total, samples = 0.0, 0
        for batch in self.batches:
            inputs, target = move_data_to_device(batch, device)
            total += float(self.loss(inputs, call(model, inputs), target)) * size_of(inputs)
            samples += size_of(inputs)
        if not math.isfinite(total):
            raise StageError(
                "the loss on held-out training data is NaN or infinite; lower learning_rate, set clip_norm, or look at "
                "the model that came into this step"
            )
        return -total / max(1, samples)


def hold_out(batches: Batches, share: float, seed: int) -> tuple[Batches, Batches]:
    """Split training data in two, the second part about `share` of it.

    A DataLoader over a map-style dataset is split by samples. Any other iterable is split by the position of its
    batches, so it must yield the same batches in the same order every time.
    """
    if _is_split_by_samples(batches):
        count = len(batches.dataset)  # type: ignore[arg-type]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(1, round(len(order) * share))
        shuffle = isinstance(batches.sampler, torch.utils.data.RandomSampler)
        return _part(batches, order[held:], shuffle, batches.drop_last), _part(batches, order[:held], False, False)
    count = sum(1 for _ in batches)
    if count < 2:
        raise StageError(
            f"the train split holds {count} batches; it must hold at least 2, one to pick the best epoch by"
        )
    every = max(2, min(round(1 / share), count))
    return _Every(batches, every, held=False), _Every(batches, every, held=True)


def _is_split_by_samples(batches: Batches) -> TypeGuard[DataLoader[Any]]:
    """Whether samples can be drawn anew: not where a sampler of the user's own decides which ones and how often."""
    return (
        isinstance(batches, DataLoader)
        and hasattr(batches.dataset, "__len__")
        and batches.batch_size is not None
        and type(batches.batch_sampler) is torch.utils.data.BatchSampler
        and _takes_each_once(batches.sampler, len(batches.dataset))
    )


def _takes_each_once(sampler: Any, count: int) -> bool:
    if type(sampler) is torch.utils.data.RandomSampler:
        return not sampler.replacement and sampler.num_samples == count
    return type(sampler) is torch.utils.data.SequentialSampler


def _part(loader: DataLoader[Any], indices: list[int], shuffle: bool, drop_last: bool) -> DataLoader[Any]:
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        shuffle=shuffle,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        drop_last=drop_last,
        generator=loader.generator if shuffle else None,
        worker_init_fn=loader.worker_init_fn,
        pin_memory=loader.pin_memory,
    )


@dataclass(frozen=True)
class _Every:
    """Every n-th batch of `batches`, or all the others."""

    batches: Iterable[Any]
    n: int
    held: bool

    def __iter__(self) -> Any:
        return (batch for i, batch in enumerate(self.batches) if (i % self.n == self.n - 1) == self.held)

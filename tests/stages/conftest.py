"""A task of random images, a small network of the kinds that stages meet, and the context that a stage gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from optpipe.context import Context
from optpipe.target import Target
from optpipe.task import Task, top1_accuracy


class Residual(nn.Module):
    """Batch norm, a shortcut, dropout, an identity and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.shortcut = nn.Sequential(nn.Identity(), nn.Conv2d(32, 32, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 4))

    def forward(self, image):
        x = self.stem(image)
        return self.head(torch.relu(self.norm(self.conv(x)) + self.shortcut(x)))


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3, 8, 8), torch.randint(4, (16,))) for _ in range(4)]
    return Task(
        train=batches, validation=batches, calibration=batches, test=batches,
        example_inputs=batches[0][0], metric=top1_accuracy(),
    )  # fmt: skip


@pytest.fixture
def model(task: Task) -> nn.Module:
    torch.manual_seed(0)
    network = Residual().train()
    for images, _ in task.train:  # gives batch norm statistics that matter
        network(images * 2 + 1)
    return network.eval()


@pytest.fixture
def context(task: Task, tmp_path: Path) -> Callable[..., Context]:
    def make(baseline: nn.Module, **target) -> Context:
        return Context(
            dir=tmp_path, task=task, target=Target(**target), baseline=copy.deepcopy(baseline),
            device="cpu", seed=0, measurer=None,
        )  # fmt: skip

    return make

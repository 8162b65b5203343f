"""Somebody's own network and task, in a folder of their own: nothing here is known to optpipe."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from optpipe import Metric, Task


class Perceptron(nn.Module):
    """8×8 images, flat (n, 64) -> logits (n, 10)."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(0.1), nn.Linear(hidden, 10))

    def forward(self, pixels):
        return self.layers(pixels)


def perceptron(hidden: int = 64) -> nn.Module:
    return Perceptron(hidden)


def pixels(batch_size: int = 64, empty: str = "") -> Task:
    """Splits are plain lists of batches; `empty` names one to leave without any."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    bounds = {"train": (0, 1000), "calibration": (0, 200), "validation": (1000, 1400), "test": (1400, 1797)}

    def batches(name: str) -> list:
        first, last = bounds[name]
        if name == empty:
            return []
        return [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(first, last, batch_size)]

    return Task(
        **{name: batches(name) for name in bounds},
        example_inputs=x[:4],
        metric=Metric(name="accuracy", score=lambda logits, target: (logits.argmax(1) == target).float()),
    )


def untyped() -> Task:
    """Not a Task at all."""
    return {"train": []}


def train(weights, epochs: int = 8) -> nn.Module:
    """Really train the perceptron and write its weights to `weights` (.safetensors or .pt)."""
    import safetensors.torch

    torch.manual_seed(0)
    model, task = Perceptron(), pixels()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for x, y in task.train:
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()
    if weights.suffix == ".safetensors":
        safetensors.torch.save_model(model, str(weights))
    else:
        torch.save(model.state_dict(), weights)
    return model.eval()

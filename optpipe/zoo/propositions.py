"""Thirteen propositions about four numbers: a task whose truth is known, a reasoner that no tracer captures, and the
residual networks that can take its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from optpipe.metrics import Metric, multilabel_accuracy
from optpipe.progress import say
from optpipe.task import Task
from optpipe.training import Schedule, fit
from optpipe.zoo.weights import trained_once

# How far each is from being on the edge, positive where it is true.
PROPOSITIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "a > b": lambda a, b, c, d: a - b,
    "a + b > c": lambda a, b, c, d: a + b - c,
    "a + b > c + d": lambda a, b, c, d: a + b - c - d,
    "the sum is positive": lambda a, b, c, d: a + b + c + d,
    "a is the largest": lambda a, b, c, d: a - _largest(b, c, d),
    "d is the smallest": lambda a, b, c, d: _smallest(a, b, c) - d,
    "they ascend": lambda a, b, c, d: _smallest(b - a, c - b, d - c),
    "b lies between a and c": lambda a, b, c, d: _smallest(_largest(a, c) - b, b - _smallest(a, c)),
    "two or more are negative": lambda a, b, c, d: -torch.stack([a, b, c, d]).sort(dim=0).values[1],
    "the range exceeds 1": lambda a, b, c, d: _largest(a, b, c, d) - _smallest(a, b, c, d) - 1,
    "a and d have one sign": lambda a, b, c, d: (a * d).sign() * _smallest(a.abs(), d.abs()),
    "|a - b| > |c - d|": lambda a, b, c, d: (a - b).abs() - (c - d).abs(),
    "a * d > b * c": lambda a, b, c, d: a * d - b * c,
}
MARGIN = 0.02  # samples closer than this to the edge of a proposition are not drawn
TRAIN, VALIDATION, CALIBRATION, TEST = 24576, 2048, 256, 4096
OUTPUTS = ["reasoning_scores", "confidence"]
EPOCHS, MLP_EPOCHS = 1, 4


def _largest(*numbers: Tensor) -> Tensor:
    return torch.stack(numbers).amax(dim=0)


def _smallest(*numbers: Tensor) -> Tensor:
    return torch.stack(numbers).amin(dim=0)


def confidence_of(scores: Tensor) -> Tensor:
    """Logits (n, propositions) -> (n,): the mean over propositions of the probability of the likelier answer."""
    return scores.abs().sigmoid().mean(dim=1)


class Reasoner(nn.Module):
    """Numbers (n, 4) -> a nested dict with logits (n, 13), a confidence (n,), and a record of every step of thought.

    A transformer (Vaswani et al. 2017) reads the numbers as a text of four words. Then a thought, the state of a GRU
    cell (Cho et al. 2014), asks a memory of learned slots and of what was read, step by step (Sukhbaatar et al. 2015),
    until every sample of the batch is confident. It trains with all of them.
    """

    def __init__(
        self, hidden: int = 256, layers: int = 7, heads: int = 4, slots: int = 32, steps: int = 7, enough: float = 0.97
    ) -> None:
        super().__init__()
        self.heads, self.steps, self.enough = heads, steps, enough
        self.number = nn.Linear(1, hidden)
        self.place = nn.Parameter(torch.randn(4, hidden) / hidden**0.5)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.slots = nn.Parameter(torch.randn(slots, hidden) / hidden**0.5)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.think = nn.GRUCell(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.judge = nn.Linear(hidden, len(PROPOSITIONS))

    def forward(self, numbers: Tensor) -> dict[str, Any]:
        read = self.number(numbers.unsqueeze(2)) + self.place
        for layer in self.layers:
            read = layer(read)
        keys, values = (self._by_head(self._remembered(project, read)) for project in (self.key, self.value))
        thought = read.mean(dim=1)
        chain: list[dict[str, Any]] = []
        for step in range(self.steps):
            query = self._by_head(self.query(thought).unsqueeze(1))
            recalled = F.scaled_dot_product_attention(query, keys, values).flatten(1)
            thought = self.think(recalled, thought)
            scores = self.judge(self.norm(thought))
            confidence = confidence_of(scores)
            chain.append({"step": step, "scores": scores, "confidence": confidence, "did": "recall"})
            if not self.training and confidence.min().item() > self.enough:
                break
        stopped = "confident" if len(chain) < self.steps else "out of steps"
        return {
            "reasoning_scores": scores,
            "confidence": confidence,
            "state": {"thought": thought, "read": read},
            "chain": chain,
            "depth": len(chain),
            "strategy": [self.steps, stopped],
        }

    def _remembered(self, project: nn.Module, read: Tensor) -> Tensor:
        """The slots, equal for all samples, and what was read of each."""
        return torch.cat([project(self.slots).expand(read.shape[0], -1, -1), project(read)], dim=1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.heads, x.shape[2] // self.heads).transpose(1, 2)


def loss(outputs: Any, target: Tensor) -> Tensor:
    """Binary cross-entropy of the scores among the outputs, all propositions alike."""
    return F.binary_cross_entropy_with_logits(outputs["reasoning_scores"], target)


class ResidualBlock(nn.Module):
    """A shortcut beside two linear layers (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.act(self.up(x)))
        return out


class ResidualMLP(nn.Module):
    """Numbers (n, 4) -> logits (n, 13) and their confidence (n,). By default 0.93 M parameters."""

    def __init__(self, width: int = 256, blocks: int = 7) -> None:
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.head = nn.Linear(width, len(PROPOSITIONS))

    def forward(self, numbers: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.blocks(self.stem(numbers)))
        return {"reasoning_scores": scores, "confidence": confidence_of(scores)}


def label_accuracy() -> Metric:
    """`multilabel_accuracy` of the scores among the outputs."""
    judge = multilabel_accuracy()
    assert judge.score is not None
    score = judge.score
    return Metric(name=judge.name, score=lambda outputs, target: score(outputs["reasoning_scores"], target))


def draw(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers (size, 4) between -1 and 1, none at the edge of a proposition, and which are true of them (size, 13)."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(4 * size, 4, generator=generator) * 2 - 1
    margins = torch.stack([margin(*numbers.unbind(1)) for margin in PROPOSITIONS.values()], dim=1)
    clear = (margins.abs() > MARGIN).all(dim=1)
    return numbers[clear][:size], (margins[clear][:size] > 0).float()


def task(train: int = TRAIN) -> Task:
    """Numbers (n, 4) and which propositions are true of them, (n, 13); drawn anew by each call, and always the same.

    train: samples to train with.
    """

    def batches(seed: int, samples: int, *, size: int = 64, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*draw(samples, seed)), batch_size=size, shuffle=shuffle)

    return Task(
        train=batches(0, train, size=32, shuffle=True),
        validation=batches(1, VALIDATION),
        calibration=batches(2, CALIBRATION),
        test=batches(3, TEST),
        example_inputs=draw(16, 0)[0],
        metric=label_accuracy(),
        loss=loss,
        fingerprint=f"propositions, margin {MARGIN}, {train} to train with, seeds 0 to 3",
        outputs=OUTPUTS,
        input_names=["numbers"],
        class_names=list(PROPOSITIONS),
    )


def trained(seed: int = 0) -> Reasoner:
    """The baseline. The first call on a machine trains it; later ones read the weights that it kept."""
    torch.manual_seed(seed)
    return trained_once(f"reasoner_{seed}_{EPOCHS}", Reasoner(), train)


def trained_mlp(seed: int = 0) -> ResidualMLP:
    """A residual MLP of 0.93 M parameters for the same task; kept as `trained` does."""
    torch.manual_seed(seed)
    return trained_once(f"residual_mlp_{seed}_{MLP_EPOCHS}", ResidualMLP(), train_mlp)


def train(model: Reasoner) -> None:
    """Train `model` in place by the mean loss of its steps, so that an early one can answer too."""

    def of_steps(_: Any, outputs: Any, target: Tensor) -> Tensor:
        losses = [F.binary_cross_entropy_with_logits(step["scores"], target) for step in outputs["chain"]]
        return torch.stack(losses).mean()

    say("Training the reference reasoner on propositions (once; the weights are kept)")
    schedule = Schedule(epochs=EPOCHS, learning_rate=5e-4, warmup=0.1, clip_norm=1.0)
    fit(model, task().train, of_steps, schedule, description="training the reasoner")


def train_mlp(model: ResidualMLP) -> None:
    """Train `model` in place on the propositions."""
    say("Training the reference residual MLP on propositions (once; the weights are kept)")
    fit(
        model,
        task().train,
        lambda inputs, outputs, target: loss(outputs, target),
        Schedule(epochs=MLP_EPOCHS, learning_rate=1e-3, clip_norm=1.0),
        description="training the residual MLP",
    )

"""Networks as people write them, by name, each with four samples, and their way out of Python.

Those that no way captures hold a comment `# here` in the line that says why.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networks
import torch
from networks import classify, conv
from torch import Tensor, nn
from torch.nn import functional as F

from optpipe import parity
from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.forms import form
from optpipe.stages.export.onnx import Onnx
from optpipe.stages.simplify import Standard
from optpipe.stages.trace import Program
from optpipe.target import Target
from optpipe.task import Inputs, Task, top1_accuracy

SAMPLES, WORDS, VOCABULARY = 4, 12, 50


@dataclass(frozen=True)
class Network:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    what: str
    outputs: tuple[str, ...] = ()  # those that the task names
    line: str = ""  # of the source, which the reason must show where nothing captures the network

    def task(self) -> Task:
        torch.manual_seed(0)
        batch = (self.inputs(), torch.zeros(SAMPLES, dtype=torch.long))
        return Task(
            train=[batch], validation=[batch], calibration=[batch], test=[batch], example_inputs=batch[0],
            metric=top1_accuracy(), outputs=list(self.outputs),
        )  # fmt: skip

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):  # statistics that matter when they are folded
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        return model


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(SAMPLES, channels, size, size)


def words(length: int = WORDS) -> Tensor:
    return torch.randint(4, VOCABULARY, (SAMPLES, length))


def block(inputs: int, outputs: int, **settings: Any) -> nn.Sequential:
    settings = {"padding": 1, "bias": False, **settings}
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, **settings), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def plain() -> nn.Module:
    """VGG's: every activation is the same module."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(
        conv(3, 16), nn.BatchNorm2d(16), relu, nn.MaxPool2d(2), conv(16, 32), nn.BatchNorm2d(32), relu, nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), relu, nn.Dropout(), nn.Linear(64, 4),
    )  # fmt: skip


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = block(16, 16, groups=16, stride=2), block(16, 32, padding=1)
        self.stem, self.head = block(3, 16), classify(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pointwise(self.depthwise(self.stem(x))))


class Dense(nn.Module):
    """DenseNet's block: every layer reads all before it, out of a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(3 + 8 * i, 8) for i in range(4))
        self.head = classify(35)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.head(torch.cat(found, dim=1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 16), classify(64)
        self.branches = nn.ModuleDict(
            {
                "point": conv(16, 16, 1),
                "wide": nn.Sequential(conv(16, 8, 1), conv(8, 16, 5)),
                "split": nn.Sequential(
                    nn.Conv2d(16, 16, (1, 3), padding=(0, 1)), nn.Conv2d(16, 16, (3, 1), padding=(1, 0))
                ),
                "pool": nn.Sequential(nn.AvgPool2d(3, 1, padding=1), conv(16, 16, 1)),
            }
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([branch(x) for _, branch in self.branches.items()], 1).relu())


class Atrous(nn.Module):
    """DeepLab's pyramid: dilated convolutions and a pooled branch that is blown up to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, stride=2)
        self.rates = nn.ModuleList(block(16, 8, padding=rate, dilation=rate) for rate in (1, 2, 3))
        self.pooled, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        pooled = F.interpolate(self.pooled(F.adaptive_avg_pool2d(y, 1)), size=y.shape[-2:], mode="nearest")
        logits = self.head(torch.cat([*(rate(y) for rate in self.rates), pooled], 1))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 8), block(8, 16), block(16, 32)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merge, self.head = nn.ModuleList([block(32, 16), block(16, 8)]), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip, x = skips.pop(), up(x)
            if x.shape[-1] != skip.shape[-1]:
                x = F.pad(x, (0, skip.shape[-1] - x.shape[-1], 0, skip.shape[-2] - x.shape[-2]))
            x = merge(torch.cat([skip, x], 1))
        return self.head(x)


class Detector(nn.Module):
    """A feature pyramid with heads for classes and boxes on each level, boxes decoded on a grid of anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.deep = block(3, 8, stride=2), block(8, 16, stride=2), block(16, 32, stride=2)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (8, 16, 32))
        self.classes, self.boxes = nn.Conv2d(16, 5, 1), nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> list[dict[str, Tensor]]:
        found = [self.stem(image)]
        for layer in (self.middle, self.deep):
            found.append(layer(found[-1]))
        levels = [lateral(level) for lateral, level in zip(self.lateral, found, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:])
        return [{"logits": self.classes(level).flatten(2).mT, "boxes": self.decode(level)} for level in levels]

    def decode(self, level: Tensor) -> Tensor:
        height, width = level.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = torch.stack([columns, rows], -1).to(level.dtype).add(0.5).view(1, -1, 2)
        offset, extent = self.boxes(level).flatten(2).mT.split(2, dim=-1)
        centre, extent = centre + offset.tanh(), extent.clamp(-4, 4).exp()
        return torch.cat([centre - extent / 2, centre + extent / 2], -1)


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 64), nn.GELU(), nn.Linear(64, 8), nn.Linear(8, 64), nn.GELU(),
        nn.Linear(64, 768), nn.Sigmoid(), nn.Unflatten(1, (3, 16, 16)),
    )  # fmt: skip


class Variational(nn.Module):
    """An autoencoder that draws only while it is trained, and returns a named tuple's worth of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.spread = nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.decoder = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y = self.encoder(x).relu()
        mean, spread = self.mean(y), self.spread(y)
        code = mean + torch.randn_like(mean) * (0.5 * spread).exp() if self.training else mean
        return self.decoder(code), (mean, spread)


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)), nn.ConvTranspose2d(16, 32, 4), nn.BatchNorm2d(32), nn.ReLU(True),
        nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.ConvTranspose2d(16, 3, 4, 2, 1),
        nn.Tanh(),
    )  # fmt: skip


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.tokens, self.channels = nn.Conv2d(3, 32, 4, 4), nn.Linear(16, 16), nn.Linear(32, 32)
        self.first, self.second, self.head = nn.LayerNorm(32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + F.gelu(self.channels(self.second(x)))).mean(dim=1))


class Windows(nn.Module):
    """Swin's: attention within windows of an image that is rolled, with a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.heads = 4, 2
        self.patches, self.mix, self.out = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table, self.head = nn.Parameter(torch.randn(49, 2)), nn.Linear(16, 4)
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None, :] + 3).permute(1, 2, 0)
        self.register_buffer("places", apart[..., 0] * 7 + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.patches(x), shifts=(-2, -2), dims=(2, 3)).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        size = self.size
        x = x.view(batch, height // size, size, width // size, size, channels).transpose(2, 3)
        x = x.reshape(-1, size * size, channels)
        query, key, value = (
            self.mix(x).view(x.shape[0], -1, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        )
        scores = query @ key.transpose(-2, -1) * (channels // self.heads) ** -0.5
        scores = scores + self.table[self.places].permute(2, 0, 1)
        x = self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return self.head(x.view(batch, -1, channels).mean(1))


class Decoder(nn.Module):
    """GPT's: learned positions, a causal mask cut to the length, heads by view, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(64, 32)
        self.mix, self.out, self.norm = nn.Linear(32, 96), nn.Linear(32, 32), nn.LayerNorm(32)
        self.register_buffer("mask", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.size()
        assert length <= 64, f"{length} tokens; there are positions for 64"
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        query, key, value = (
            part.view(batch, length, 4, 8).transpose(1, 2) for part in self.mix(self.norm(x)).split(32, dim=2)
        )
        scores = (query @ key.transpose(-2, -1)) / 8**0.5
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).contiguous().view(batch, length, 32))
        return x @ self.tokens.weight.T


class Rotary(nn.Module):
    """LLaMA's: root mean square norm, rotated positions, fewer heads of keys, gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.query, self.key_value = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.out, self.gate, self.up, self.down = (
            nn.Linear(32, 32),
            nn.Linear(32, 64),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.scale = nn.Parameter(torch.ones(32))
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, 8, 2) / 8), persistent=False)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[-2], device=x.device), self.frequencies)
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        y = self.norm(x)
        query = self.query(y).unflatten(-1, (4, 8)).transpose(1, 2)
        key, value = self.key_value(y).unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
        key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(self.rotate(query), self.rotate(key), value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class EncoderDecoder(nn.Module):
    """PyTorch's own transformer, with a causal mask; None leaves it to the transformer to see that it is one."""

    def __init__(self, is_causal: bool | None = None) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.tokens, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.body = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source < 8
        found = self.body(  # here
            self.tokens(source), self.tokens(target), tgt_mask=mask, tgt_is_causal=self.is_causal,
            src_key_padding_mask=torch.zeros_like(padding, dtype=torch.float).masked_fill(padding, float("-inf")),
        )  # fmt: skip
        return self.head(found)


class Recurrent(nn.Module):
    """Two layers whose last state is read, with the states made in `forward` as tutorials do."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.tokens, self.body, self.head = (
            nn.Embedding(VOCABULARY, 16),
            kind(16, 24, 2, batch_first=True),
            nn.Linear(24, 4),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        state = torch.zeros(2, tokens.size(0), 24)
        _, last = self.body(self.tokens(tokens), (state, state) if isinstance(self.body, nn.LSTM) else state)
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 16, bidirectional=True, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0])


class ConvLSTM(nn.Module):
    """A cell written by hand, called in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.head = conv(3 + 8, 32), conv(8, 1)

    def forward(self, video: Tensor) -> Tensor:
        n, steps, _, h, w = video.shape
        hidden, cell = video.new_zeros(n, 8, h, w), video.new_zeros(n, 8, h, w)
        found = []
        for step in range(steps):
            gates = self.gates(torch.cat([video[:, step], hidden], dim=1)).chunk(4, 1)
            forget, enter, out = (torch.sigmoid(gate) for gate in gates[:3])
            cell = forget * cell + enter * torch.tanh(gates[3])
            hidden = out * torch.tanh(cell)
            found.append(self.head(hidden))
        return torch.stack(found, dim=1)


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 4, 1)
        self.layers = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(4))
        self.norm = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), 0
        for layer in self.layers:
            value, gate = layer(F.pad(x, (layer.dilation[0], 0))).chunk(2, dim=1)
            y = self.norm(torch.tanh(value) * torch.sigmoid(gate))
            x, total = x + y, total + y
        return self.head(torch.relu(total))


class Greedy(nn.Module):
    """A caption of five words, each chosen from the scores of the one before, attention over the picture in between."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.words, self.cell = nn.Conv2d(3, 16, 4, 4), nn.Embedding(20, 16), nn.GRUCell(32, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, image: Tensor) -> Tensor:
        memory = self.picture(image).flatten(2).transpose(1, 2)
        state, word = memory.mean(1), torch.zeros(image.size(0), dtype=torch.long)
        scores = []
        for _ in range(5):
            seen = (torch.bmm(memory, state.unsqueeze(2)).softmax(1) * memory).sum(1)
            state = self.cell(torch.cat([self.words(word), seen], 1), state)
            scores.append(self.head(state))
            word = scores[-1].argmax(1)
        return torch.stack(scores, 1)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.cosine_similarity(F.normalize(self.body(left)), self.body(right), dim=1)


class Heads(nn.Module):
    """Returns a dict of tensors and of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.age = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x).relu()
        return {"kind": self.kind(y), "more": {"age": self.age(y).squeeze(-1), "features": y}}


class Pair(nn.Module):
    """Returns a tuple with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            states.append(x)
        return x.sum(-1), states


@dataclass
class Prediction:
    logits: Tensor
    features: Tensor
    loss: Tensor | None = None


class Structured(nn.Module):
    """Returns a dataclass with a field that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Prediction:
        features = self.body(x).relu()
        logits = self.head(features)
        loss = None if target is None else F.cross_entropy(logits, target)
        return Prediction(logits=logits, features=features, loss=loss)


class Optional(nn.Module):
    """A mask that callers may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.tokens(tokens) * scale
        if mask is None:
            return self.head(x.mean(1))
        weight = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))


class Keywords(nn.Module):
    """Takes its inputs by name only, and one of them in a `**kwargs`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.sparse, self.head = nn.Linear(8, 16), nn.Embedding(VOCABULARY, 16), nn.Linear(16, 2)

    def forward(self, *, category: Tensor, **features: Tensor) -> Tensor:
        return self.head(self.sparse(category) + self.dense(features["values"]))


class Mixture(nn.Module):
    """Two of four experts for each token, their weights scattered; every expert computes."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        best, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        weight = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        return torch.stack([expert(x) for expert in self.experts], -1).mul(weight.unsqueeze(-2)).sum(-1)


class Sparse(nn.Module):
    """A mixture whose experts see only their own tokens: sizes that depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        choice, found = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(choice == number)
            found.index_add_(0, rows, expert(flat[rows]))
        return found.view_as(x)


class PointNet(nn.Module):
    """A cloud of points, turned by a small network of its own, then a maximum over all."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix, self.body = nn.Linear(16, 9), nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, points: Tensor) -> Tensor:
        batch = points.size()[0]
        turn = self.matrix(torch.max(self.turn(points), 2, keepdim=True)[0].view(-1, 16)).view(-1, 3, 3)
        turn = turn + torch.eye(3, dtype=points.dtype).view(1, 9).repeat(batch, 1).view(batch, 3, 3)
        points = torch.bmm(points.transpose(2, 1), turn).transpose(2, 1)
        return F.log_softmax(self.head(torch.max(self.body(points), dim=2)[0]), dim=-1)


class GraphConvolution(nn.Module):
    """Nodes and an adjacency matrix, normalised by degree."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency + torch.eye(adjacency.size(-1))
        degree = adjacency.sum(-1).pow(-0.5)
        adjacency = degree.unsqueeze(-1) * adjacency * degree.unsqueeze(-2)
        return self.second(adjacency @ torch.relu(self.first(adjacency @ nodes)))


class Recommender(nn.Module):
    """Columns of a table, one embedding each, crossed by products of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 8) for size in (10, 20, 30))
        self.bottom, self.top = nn.Linear(5, 8), nn.Sequential(nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 1))
        self.register_buffer("pairs", torch.triu_indices(4, 4, offset=1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers).relu()
        columns = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([dense, *columns], dim=1)
        crossed = torch.bmm(stacked, stacked.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, crossed], 1)).squeeze(1).sigmoid()


class Reports(nn.Module):
    """Returns tensors among numbers, strings and a list of records."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        chain = []
        for step, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            chain.append({"step": step, "state": x, "name": f"layer {step}"})
        return {"scores": self.head(x), "confidence": x.abs().mean(1), "chain": chain, "depth": 3, "strategy": [1, "b"]}


class Conditional(nn.Module):
    """A condition on the data, said so that a graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.cheap, self.dear = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda v: self.cheap(v), lambda v: torch.tanh(self.dear(v)), (x,))


class StopsEarly(nn.Module):
    """Ends its loop as soon as it is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if self.head(x).softmax(-1).max() > 0.9:  # here
                break
        return self.head(x)


class Experts(nn.Module):
    """Leaves out an expert that nobody chose."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.router(x).argmax(-1)
        found = torch.zeros(x.shape[0], 3)
        for number, expert in enumerate(self.experts):
            mask = choice == number
            if mask.any():  # here
                found = torch.where(mask.unsqueeze(1), expert(x), found)
        return found


def language_model(kind: str, **settings: Any) -> nn.Module:
    """A network of `transformers` with random weights, of two layers."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**settings)
    model: nn.Module = {
        "Bert": transformers.BertForSequenceClassification,
        "DistilBert": transformers.DistilBertForSequenceClassification,
        "Roberta": transformers.RobertaForTokenClassification,
        "GPT2": transformers.GPT2LMHeadModel,
        "Llama": transformers.LlamaForCausalLM,
        "T5": transformers.T5EncoderModel,
        "ViT": transformers.ViTForImageClassification,
        "Swin": transformers.SwinForImageClassification,
        "Whisper": transformers.models.whisper.modeling_whisper.WhisperEncoder,
        "Wav2Vec2": transformers.Wav2Vec2Model,
        "CLIP": transformers.CLIPModel,
    }[kind](config)
    return model


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT = {
    "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def sentence() -> Inputs:
    mask = torch.ones(SAMPLES, WORDS, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": words(), "attention_mask": mask}


NETWORKS: dict[str, Network] = {
    "plain": Network(plain, images, "convolutions, batch norm, one shared ReLU in place"),
    "residual": Network(networks.Residual, images, "convolutions with shortcuts"),
    "separable": Network(Separable, images, "depthwise and pointwise convolutions"),
    "inverted residual": Network(networks.Mobile, images, "MobileNetV3's block"),
    "squeeze-excite": Network(networks.SqueezeExcite, images, "channels scaled by what the image holds"),
    "dense": Network(Dense, images, "concatenation of a growing list"),
    "inception": Network(Inception, images, "branches from a ModuleDict"),
    "shuffle": Network(networks.Shuffle, images, "grouped convolutions, channels in another order"),
    "atrous": Network(Atrous, images, "dilated convolutions, interpolation to the size of the input"),
    "convnext": Network(networks.ChannelsLast, images, "layer norm over channels"),
    "u-net": Network(UNet, images, "skips on a stack, padding that depends on sizes"),
    "detector": Network(Detector, images, "feature pyramid, heads and boxes on three levels"),
    "autoencoder": Network(autoencoder, images, "linear layers down and up"),
    "variational": Network(Variational, lambda: torch.randn(SAMPLES, 64), "draws numbers, in training only"),
    "generator": Network(generator, lambda: torch.randn(SAMPLES, 16), "transposed convolutions"),
    "mixer": Network(Mixer, images, "linear layers over patches, then channels"),
    "vision transformer": Network(networks.VisionTransformer, lambda: images(8), "a token that is expanded"),
    "windows": Network(Windows, images, "Swin's shifted windows"),
    "encoder": Network(networks.Padded, words, "PyTorch's transformer encoder with padding"),
    "decoder": Network(Decoder, words, "GPT's causal attention by hand"),
    "rotary": Network(Rotary, words, "LLaMA's attention and feed-forward"),
    "encoder-decoder": Network(
        lambda: EncoderDecoder(is_causal=True), lambda: (words(), words(7)), "PyTorch's transformer, two inputs"
    ),
    "encoder-decoder unsaid": Network(
        EncoderDecoder, lambda: (words(), words(7)), "the same, that looks whether its mask is causal",
        line="found = self.body(  # here",
    ),
    "lstm": Network(lambda: Recurrent(nn.LSTM), words, "two layers, states made in forward"),
    "gru": Network(lambda: Recurrent(nn.GRU), words, "two layers, states made in forward"),
    "bidirectional": Network(Bidirectional, lambda: torch.randn(SAMPLES, 10, 8), "an LSTM both ways"),
    "convlstm": Network(ConvLSTM, lambda: torch.randn(SAMPLES, 4, 3, 8, 8), "a cell in a loop over time"),
    "wavenet": Network(WaveNet, lambda: torch.randn(SAMPLES, 2, 32), "causal dilated convolutions, weight norm"),
    "greedy": Network(Greedy, images, "a loop that feeds its own choice back"),
    "siamese": Network(Siamese, lambda: (images(), images()), "two inputs, one body"),
    "dict": Network(Heads, lambda: torch.randn(SAMPLES, 8), "a dict in a dict"),
    "tuple": Network(Pair, lambda: torch.randn(SAMPLES, 8), "a list in a tuple"),
    "dataclass": Network(Structured, lambda: torch.randn(SAMPLES, 8), "a dataclass with a field that is None"),
    "optional left out": Network(Optional, words, "an optional mask, not given"),
    "optional given": Network(
        Optional, lambda: {"tokens": words(), "mask": torch.rand(SAMPLES, WORDS) < 0.7}, "an optional mask, given"
    ),
    "keywords": Network(
        Keywords, lambda: {"category": words()[:, 0], "values": torch.randn(SAMPLES, 8)}, "inputs by name only"
    ),
    "mixture": Network(Mixture, lambda: torch.randn(SAMPLES, 6, 16), "experts by top-k"),
    "sparse mixture": Network(Sparse, lambda: torch.randn(SAMPLES, 6, 16), "experts on rows of their own"),
    "pointnet": Network(PointNet, lambda: torch.randn(SAMPLES, 3, 20), "a maximum over points"),
    "graph": Network(
        GraphConvolution, lambda: (torch.randn(SAMPLES, 6, 8), (torch.rand(SAMPLES, 6, 6) < 0.4).float()),
        "nodes and an adjacency matrix",
    ),
    "recommender": Network(
        Recommender, lambda: (torch.randn(SAMPLES, 5), torch.randint(10, (SAMPLES, 3))), "embeddings crossed in pairs"
    ),
    "reports": Network(
        Reports, lambda: torch.randn(SAMPLES, 8), "tensors among numbers, strings and records", ("scores", "confidence")
    ),
    "cond": Network(Conditional, lambda: torch.randn(SAMPLES, 8), "torch.cond"),
    "stops early": Network(
        StopsEarly, lambda: torch.randn(SAMPLES, 8), "a loop that ends when it is sure", line="max() > 0.9:  # here"
    ),
    "experts left out": Network(
        Experts, lambda: torch.randn(SAMPLES, 8), "experts that nobody chose are left out", line="mask.any():  # here"
    ),
}  # fmt: skip

TRANSFORMERS: dict[str, Network] = {
    "bert": Network(lambda: language_model("Bert", **SMALL, **TEXT), sentence, "BERT, classes of texts", ("logits",)),
    "distilbert": Network(
        lambda: language_model("DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64, **TEXT), sentence,
        "DistilBERT, all that it returns",
    ),
    "roberta": Network(lambda: language_model("Roberta", **SMALL, **TEXT), sentence, "RoBERTa, classes of tokens"),
    "gpt2": Network(
        lambda: language_model("GPT2", use_cache=False, **GPT),
        sentence, "GPT-2 without a cache",
    ),
    "gpt2 with a cache": Network(
        lambda: language_model("GPT2", **GPT), sentence,
        "GPT-2 as it comes, which returns its cache too", ("logits",),
    ),
    "llama": Network(
        lambda: language_model("Llama", num_key_value_heads=1, use_cache=False, **SMALL, **TEXT), sentence, "LLaMA",
    ),
    "t5 encoder": Network(
        lambda: language_model("T5", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=VOCABULARY),
        sentence, "T5's encoder",
    ),
    "vit": Network(
        lambda: language_model("ViT", image_size=16, patch_size=4, **SMALL), lambda: {"pixel_values": images()}, "ViT"
    ),
    "swin": Network(
        lambda: language_model(
            "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
        ),
        lambda: images(32), "Swin",
    ),
    "whisper encoder": Network(
        lambda: language_model("Whisper", d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64,
                               num_mel_bins=8, max_source_positions=16),
        lambda: torch.randn(SAMPLES, 8, 32), "Whisper's encoder",
    ),
    "wav2vec": Network(
        lambda: language_model(
            "Wav2Vec2", conv_dim=[16, 16], conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4, num_feat_extract_layers=2, **SMALL,
        ),
        lambda: torch.randn(SAMPLES, 800), "wav2vec 2.0, sound to features",
    ),
    "clip": Network(
        lambda: language_model(
            "CLIP", text_config={**SMALL, **TEXT}, vision_config={**SMALL, "image_size": 16, "patch_size": 4},
            projection_dim=16,
        ),
        lambda: {**sentence(), "pixel_values": images()}, "CLIP, texts and images",
        ("logits_per_image", "text_embeds", "image_embeds"),
    ),
}  # fmt: skip


@dataclass
class Carried:
    """What became of one network."""

    name: str
    way: str = ""  # that captured it
    operators: int = 0
    parity: str = ""
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0  # of the processor

    @property
    def is_exported(self) -> bool:
        return bool(self.parity)


def carry(name: str, folder: Path) -> Carried:
    """One network through simplify, trace/program and export/onnx, its outputs compared with those of the original."""
    network, begin = {**NETWORKS, **TRANSFORMERS}[name], time.process_time()
    model, task, carried = network.network(), network.task(), Carried(name)
    ctx = Context(
        dir=folder, task=task, target=Target(), baseline=model, device="cpu", seed=0, measurer=None,
    )  # fmt: skip
    try:
        program = Program().run(Standard().run(copy.deepcopy(model), ctx), ctx)
        carried.operators = ctx.facts["operators"]
        found = parity.check(model, form("onnx").as_callable(Onnx().run(program, ctx)), task, precision="float32")
        carried.parity = f"{found.max_error:.1e}"
    except StageError as error:
        carried.reasons = (str(error),)
    carried.way = next((attempt.method for attempt in ctx.attempts if attempt.ok), "")
    if carried.way:  # else the error tells them all
        carried.reasons += tuple(f"{attempt.method}: {attempt.reason}" for attempt in ctx.attempts if not attempt.ok)
    carried.seconds = time.process_time() - begin
    return carried

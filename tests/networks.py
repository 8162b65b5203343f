"""Networks that break naive pruners, by name, each with inputs of two samples. All end in four classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE = (3, 8, 8)
TOKENS = 12
VOCABULARY = 50


def conv(inputs: int, outputs: int, size: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups)


def classify(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 16), conv(16, 16), conv(16, 32)
        self.after, self.head = conv(64, 32), classify(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.after(torch.cat([self.left(x), x, self.right(x)], 1)).relu())


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up, self.head = conv(3, 32), nn.Linear(32, 16), nn.Linear(16, 32), classify(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        scale = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        return self.head(x * scale[:, :, None, None])


class Shuffle(nn.Module):
    """ShuffleNet's: channels are put in another order by a view with constants in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.side, self.head = conv(3, 32), conv(32, 32, groups=2), conv(32, 16), classify(48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.mix(x)
        n, _, h, w = y.shape
        y = y.view(n, 2, 16, h, w).transpose(1, 2).reshape(n, 32, h, w)
        return self.head(torch.cat([y, self.side(x)], 1))


class Text(nn.Module):
    """Tokens through an embedding and a body that sees (n, length, width)."""

    def __init__(self, body: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(VOCABULARY, width), body, nn.Linear(width, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.body(self.embedding(tokens))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up, self.down = nn.MultiheadAttention(32, 4, batch_first=True), *feed_forward()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return x + self.down(self.up(self.norm(x)).relu())


def feed_forward() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(32, 64), nn.Linear(64, 32)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.before, self.recurrent, self.after, self.last = nn.Linear(32, 48), kind(48, 24, batch_first=True), *(
            nn.Linear(24, 64), nn.Linear(64, 32),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.after(self.recurrent(self.before(x))[0]).relu())


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(VOCABULARY, 32), *feed_forward()
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head((x + self.down(self.up(x).relu())).mean(1))


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.after, self.head = conv(3, 32), conv(32, 32), conv(32, 32), classify(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.after(self.again(self.again(x).relu())).relu())


class Attention(nn.Module):
    """Written by hand; `split` says what of the split into heads is fixed."""

    def __init__(self, split: str = "heads") -> None:
        super().__init__()
        self.heads, self.split, width = 4, split, 32
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.in_heads(layer(x)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return x + self.out(mixed.flatten(2))

    def in_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, {"heads": (self.heads, -1), "width": (-1, 8), "constants": (4, 8)}[self.split])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = conv(3, 32), conv(32, 32), conv(32, 32), classify(32)
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        return self.head((x + self.norms[2](self.second(self.norms[1](self.first(x)).relu()))).relu())


class Mobile(nn.Module):
    """MobileNetV3's block: depthwise, batch norm, hard swish, and squeeze-excite by a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.Hardswish()), classify(16)
        self.expand = nn.Sequential(conv(16, 48, 1), nn.BatchNorm2d(48), nn.Hardswish())
        self.depthwise = nn.Sequential(conv(48, 48, groups=48), nn.BatchNorm2d(48))
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(48, 16, 1), nn.ReLU(), nn.Conv2d(16, 48, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(conv(48, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        return self.head(x + self.project(F.hardswish(y * self.scale(y))))


class ChannelsLast(nn.Module):
    """ConvNeXt's block: layer norm over the channels, linear layers on images, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise, self.norm = conv(3, 32), conv(32, 32, groups=32), nn.LayerNorm(32)
        self.up, self.down, self.head = *feed_forward(), classify(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.head(x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Down, up again, and a concatenation of both sizes' channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = conv(3, 16), nn.Conv2d(16, 32, 3, padding="same")
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.after, self.head = conv(48, 16), classify(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.inner(F.max_pool2d(x, 2)).relu()
        wide = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0)
        return self.head(self.after(torch.cat([x, self.up(y), wide], 1)).relu())


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 32, 2, 2), nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32) * 0.1)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.layer(x)[:, 0])


class Products(nn.Module):
    """Attention by matrix products, with a mask of large numbers; `flat`: heads in the batch dimension."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.flat, self.heads = flat, 4
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("mask", torch.full((TOKENS, TOKENS), -1e4).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query = query * query.shape[-1] ** -0.5
        if self.flat:
            query, key, value = (part.flatten(0, 1) for part in (query, key, value))
            scores = torch.baddbmm(self.mask, query, key.transpose(1, 2), alpha=0.5, beta=2)
            mixed = torch.bmm(scores.softmax(-1), value).unflatten(0, (-1, self.heads))
        else:
            scores = query @ key.transpose(2, 3) + self.mask
            mixed = scores.softmax(-1) @ value
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class LinearTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(192, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.again(self.first(x.flatten(1)).relu()).relu()).relu())


class Padded(nn.Module):
    """PyTorch's own encoder, told by a mask which tokens are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.embedding, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens), src_key_padding_mask=tokens < 4).mean(1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.up, self.head = nn.EmbeddingBag(VOCABULARY, 32, mode="mean"), nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.up(self.bag(tokens)).relu())


class Einsum(nn.Module):
    """Attention whose products are written as sums over indices."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("nqc,nkc->nqk", self.query(x), self.key(x)) * 32**-0.5
        return x + self.out(torch.einsum("nqk,nkc->nqc", scores.softmax(-1), self.value(x)))


def text_encoder() -> nn.Module:
    from optpipe.zoo.docstrings import TextEncoder

    return TextEncoder(width=32, heads=4, layers=2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: nn.Sequential(conv(3, 32), nn.ReLU(), conv(32, 32, groups=4), nn.ReLU(), classify(32)),
    "depthwise": lambda: nn.Sequential(conv(3, 32), conv(32, 32, groups=32), nn.ReLU(), conv(32, 32, 1), classify(32)),
    "concatenation": Concatenation,
    "squeeze-excite": SqueezeExcite,
    "shuffle": Shuffle,
    "multi-head attention": lambda: Text(SelfAttention()),
    "transformer": lambda: Text(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)),
    "attention by hand": lambda: Text(Attention()),
    "attention with constants": lambda: Text(Attention("constants")),
    "attention of fixed width": lambda: Text(Attention("width")),
    "lstm": lambda: Text(Recurrent()),
    "gru": lambda: Text(Recurrent(nn.GRU)),
    "tied": Tied,
    "used twice": UsedTwice,
    "batch norm after linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32),
        nn.BatchNorm1d(32), nn.Linear(32, 4),
    ),
    "group norm": lambda: nn.Sequential(conv(3, 32), nn.GroupNorm(4, 32), nn.ReLU(), conv(32, 32), classify(32)),
    "transposed": lambda: nn.Sequential(conv(3, 32), nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), classify(16)),
    "conv1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 32, 3), nn.ReLU(), nn.Conv1d(32, 16, 3), nn.Flatten(), nn.Linear(960, 4)
    ),
    "text encoder": text_encoder,
    "residual": Residual,
    "mobile": Mobile,
    "channels last": ChannelsLast,
    "u-net": UNet,
    "vision": VisionTransformer,
    "attention by products": lambda: Text(Products()),
    "attention by flat products": lambda: Text(Products(flat=True)),
    "linear used twice": LinearTwice,
    "padded transformer": Padded,
    "bag of tokens": Bag,
    "attention by einsum": lambda: Text(Einsum()),
    "bidirectional lstm": lambda: Text(nn.LSTM(32, 16, bidirectional=True, batch_first=True)),
}  # fmt: skip


def example(name: str) -> Tensor:
    """Inputs of two samples for the network of that name."""
    texts = ("attention", "transformer", "lstm", "gru", "tied", "text", "tokens")
    if any(word in name for word in texts):
        length = 64 if name == "text encoder" else TOKENS
        return torch.randint(1, VOCABULARY, (2, length))
    return torch.randn(2, *IMAGE)

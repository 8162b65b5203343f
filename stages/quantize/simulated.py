"""Quantize, simulated: weights rounded to few bits and kept in float32, to study what a scheme does to quality.

Takes and gives a torch module. The file does not shrink and nothing gets faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


class Levels(Enum):
    """Which values a weight may have."""

    uniform = "uniform"  # evenly spaced around zero (Jacob et al. 2018)
    logarithmic = "logarithmic"  # zero and powers of two (Miyashita et al. 2016)


class Grouping(Enum):
    """Which weights share a scale."""

    tensor = "tensor"
    channel = "channel"  # of the output; of a transposed convolution, of the input
    group = "group"  # of `group_size` weights in a row of a channel


@register("quantize/simulated", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Simulated:
    """Round the weights of convolutions and linear layers to what 2 to 8 bits could hold, by one of two schemes.

    Uniform and symmetric (Jacob et al. 2018), or powers of two (Miyashita, Lee & Murmann 2016). The size that they
    would have packed is recorded as `simulated_packed_bytes`.
    """

    scheme: Levels = Levels.uniform
    bits: int = 4
    granularity: Grouping = Grouping.channel
    group_size: int = 32  # with granularity=group
    keep: list[str] = field(default_factory=list)  # layer name patterns that stay as they are

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; it must be from 2 to 8")
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it must be at least 1")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import torch

        layers = _layers(model, self.keep)
        others = sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())
        packed, noise, power = 0.0, 0.0, 0.0
        for name, weight in layers.items():
            if not torch.isfinite(weight).all():
                raise StageError(f"the weight of '{name}' holds NaN or infinity; train or load these weights again")
            others -= weight.nbytes
            groups = _grouped(weight.detach(), self.granularity, self.group_size)
            rounded = (uniform if self.scheme is Levels.uniform else logarithmic)(groups, self.bits)
            rounded = rounded.flatten(1)[:, : weight.numel() // len(groups)].reshape(
                weight.shape
            )  # without the padding
            noise += float((rounded - weight.detach()).double().square().sum())
            power += float(weight.detach().double().square().sum())
            weight.data.copy_(rounded)
            packed += weight.numel() * self.bits / 8 + groups.shape[:-1].numel() * _scale_bytes(self.scheme)
        total = math.ceil(packed) + others
        sqnr = 10 * math.log10(power / noise) if noise else math.inf
        ctx.record(simulated_packed_bytes=total, layers=len(layers), sqnr_db=sqnr)
        ctx.note(
            f"simulated: the weights of {len(layers)} layers hold only what {self.bits} bits could "
            f"({self.scheme.value}, one scale per {self.granularity.value}; SQNR {sqnr:.1f} dB) but stay float32: the "
            f"file does not shrink and nothing gets faster; the packed model would take {total / 1000:.1f} KB"
        )
        return model


def uniform(groups: Tensor, bits: int) -> Tensor:
    """`groups` (…, n) rounded to integers of `bits`, symmetric, times a scale for each group."""
    import torch

    limit = 2 ** (bits - 1) - 1
    step = groups.abs().amax(-1, keepdim=True) / limit
    step = torch.where(step == 0, torch.ones_like(step), step)
    return torch.round(groups / step) * step


def logarithmic(groups: Tensor, bits: int) -> Tensor:
    """`groups` (…, n) rounded to signed powers of two, the largest of each group and those below it; else zero.

    One bit is the sign; of the other codes one stands for zero.
    """
    import torch

    exponents = torch.round(torch.log2(groups.abs().clamp(min=torch.finfo(groups.dtype).tiny)))
    most = torch.round(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(groups.dtype).tiny)))
    held = exponents > most - (2 ** (bits - 1) - 1)
    return torch.where(held & (groups != 0), groups.sign() * torch.exp2(exponents), torch.zeros_like(groups))


def _scale_bytes(scheme: Levels) -> int:
    return 4 if scheme is Levels.uniform else 1  # a float32 step, or the largest exponent


def _layers(model: nn.Module, patterns: list[str]) -> dict[str, Tensor]:
    """The weights to round, each once, by the layer that holds them."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    from optpipe.patterns import matching

    every = {name: module for name, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))}
    kept = matching(every, patterns, "keep", "layer")
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in every.items():
        if name not in kept:
            found.setdefault(id(module.weight), (name, module.weight))  # type: ignore[arg-type]
    if not found:
        raise StageError("this model has no convolution or linear layer whose weights could be rounded")
    return dict(found.values())


def _grouped(weight: Tensor, granularity: Grouping, group_size: int) -> Tensor:
    """`weight` as (rows, groups, n); the n of a group share a scale."""
    from .weights import grouped

    if granularity is Grouping.tensor:
        return weight.flatten()[None, None]
    return grouped(weight, group_size if granularity is Grouping.group else 0)

"""Prune, low rank: replace a layer by two thin ones whose product is close to it.

Takes and gives a torch module. How much accuracy that costs depends on the rank; it needs training afterwards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optpipe.context import Context
from optpipe.errors import StageError, named_reason
from optpipe.registry import register

from .layers import check_finite, chosen

if TYPE_CHECKING:
    from torch import Tensor, nn

TINY = 1e-30  # instead of a division by zero, of a layer of zeros
ROUNDING = 1e-12  # share of a layer's energy that is nothing but rounding errors
WINDOW = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


@register("prune/low_rank", takes="torch", gives="torch", needs_recovery=True)
@dataclass(kw_only=True)
class LowRank:
    """Truncated singular value decomposition of linear layers and convolutions (Denton et al. 2014).

    A linear layer becomes two; a convolution becomes one of the same kernel to `rank` channels and one of 1×1, as in
    Jaderberg et al. 2014 (who also divide the kernel itself). Exactly one of `rank`, `energy` and `budget` says how
    much is kept. A layer is replaced only if that saves parameters, and with them multiplications: both fall by the
    same factor.
    """

    rank: int | None = None  # singular values kept in every layer
    energy: float | None = None  # or: as few as have this share of the sum of their squares
    budget: float | None = None  # or: those that explain most per parameter, for this share of all layers' parameters
    layers: list[str] = field(default_factory=list)  # module name patterns; empty means every one that gets smaller
    keep: list[str] = field(default_factory=list)  # module name patterns that are never touched

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"low_rank has {' and '.join(given) or 'no measure of what to keep'}; set exactly one of rank=8, "
                "energy=0.9 and budget=0.5"
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        share = self.energy if self.energy is not None else self.budget
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{given[0]} is {share}; it must be above 0 and below 1")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        check_finite(model)
        ranks: dict[str, int] = {}
        errors: dict[str, float] = {}
        larger: list[str] = []
        failed: dict[str, str] = {}
        layers = self._candidates(model)
        parts = {name: _decomposed(layer.weight.detach().flatten(1)) for name, layer in layers.items()}
        for name, rank in self._ranks(parts).items():
            layer, (u, s, v) = layers[name], parts[name]
            before, after = layer.weight.numel(), rank * (len(u) + v.shape[1])
            if after >= before:
                larger.append(f"'{name}' ({before} parameters, {after} with rank {rank})")
            elif reason := _replace(model, name, _pair(layer, u[:, :rank], s[:rank], v[:rank]), ctx):
                failed[name] = reason
            else:
                ranks[name], errors[name] = rank, float(s[rank:].norm() / s.norm().clamp(min=TINY))
        reasons = [f"'{name}' stays as it is: {reason}" for name, reason in failed.items()]
        if larger:
            reasons.append(f"would get larger, and stay as they are: {', '.join(larger)}")
        if not ranks:
            raise StageError(
                "no layer of this model gets smaller by a low rank; "
                + ("; ".join(reasons) or "it has no linear layer or ungrouped 2-d convolution of its own weights")
            )
        skipped = [name for name in layers if name not in ranks]
        kept = sum(
            ranks[name] * (len(u) + v.shape[1]) if name in ranks else layers[name].weight.numel()
            for name, (u, _, v) in parts.items()
        ) / sum(layer.weight.numel() for layer in layers.values())
        ctx.record(
            layers_replaced=len(ranks), ranks=ranks, relative_errors=errors, skipped=skipped, parameters_kept=kept
        )
        if self.budget is not None and kept > self.budget + 0.01:
            ctx.note(f"{kept:.0%} of the parameters are left, more than budget={self.budget:g}: some layers stay whole")
        worst = max(errors, key=errors.__getitem__)
        ctx.note(
            f"{len(ranks)} layers became two each, of rank {min(ranks.values())} to {max(ranks.values())}; the weights "
            f"of '{worst}' changed most, by {errors[worst]:.0%}"
        )
        for reason in reasons:
            ctx.note(reason)
        return model

    def _candidates(self, model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
        """Linear layers and ungrouped convolutions whose weights no other module uses."""
        from torch import nn

        uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
        # of exactly these types: others, such as attention's own, are read by who holds them
        fitting = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            if name and type(module) in (nn.Linear, nn.Conv2d) and uses[id(module.weight)] == 1
        }
        return {name: fitting[name] for name in chosen(fitting, self.layers, self.keep)}

    def _ranks(self, parts: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, int]:
        """How many singular values each layer is to keep."""
        if self.budget is not None:
            return _within(self.budget, parts)
        if self.rank is not None:
            return {name: min(self.rank, len(s)) for name, (_, s, _) in parts.items()}
        assert self.energy is not None
        kept = {name: (s**2).cumsum(0) / (s**2).sum().clamp(min=TINY) for name, (_, s, _) in parts.items()}
        return {name: min(len(share), int((share < self.energy).sum()) + 1) for name, share in kept.items()}


def _within(budget: float, parts: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, int]:
    """Ranks, 1 at least, that take at most `budget` of the parameters of all layers; StageError if there are none.

    Singular values are taken in the order of what they explain of their layer per parameter that they cost. A layer
    whose rank would take more than it has is kept whole.
    """
    cost = {name: len(u) + v.shape[1] for name, (u, _, v) in parts.items()}
    whole = {name: len(u) * v.shape[1] for name, (u, _, v) in parts.items()}
    worth = [
        (float(value), name)
        for name, (_, s, _) in parts.items()
        for value in (s**2) / (s**2).sum().clamp(min=TINY) / cost[name]
        if value * cost[name] > ROUNDING
    ]
    ranks, left = dict.fromkeys(parts, 1), budget * sum(whole.values()) - sum(cost.values())
    if left < 0:
        least = sum(cost.values()) / sum(whole.values())
        raise StageError(f"budget={budget} is less than the {least:.1%} that rank 1 of every layer takes; raise budget")
    taken: set[str] = set()
    for _, name in sorted(worth, reverse=True):
        if name not in taken:  # the largest of each layer is in already
            taken.add(name)
            continue
        more = min((ranks[name] + 1) * cost[name], whole[name]) - min(ranks[name] * cost[name], whole[name])
        if more > left:
            break
        ranks[name], left = ranks[name] + 1, left - more
    return ranks


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and Vᵀ of a matrix, in double precision while they are computed."""
    import torch

    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype)


def _pair(layer: nn.Linear | nn.Conv2d, u: Tensor, s: Tensor, v: Tensor) -> nn.Module:
    """Two layers in a row that do what `layer` would with the weights U S Vᵀ, each with a root of S."""
    from torch import nn

    rank, root = len(s), s.sqrt()
    thin: nn.Linear | nn.Conv2d
    wide: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Conv2d):
        window: dict[str, Any] = {name: getattr(layer, name) for name in WINDOW}
        thin = nn.Conv2d(layer.in_channels, rank, bias=False, **window)
        wide = nn.Conv2d(rank, layer.out_channels, 1)
    else:
        thin = nn.Linear(layer.in_features, rank, bias=False)
        wide = nn.Linear(rank, layer.out_features)
    thin.weight = nn.Parameter((root[:, None] * v).reshape(thin.weight.shape))
    wide.weight = nn.Parameter((u * root).reshape(wide.weight.shape))
    wide.bias = layer.bias
    return nn.Sequential(thin, wide).train(layer.training)


def _replace(model: nn.Module, name: str, pair: nn.Module, ctx: Context) -> str:
    """Put `pair` in the place of a layer; put the layer back, and say why, if the model does not run with it."""
    import torch

    from optpipe.task import batch_of, call, tensors_in

    layer = model.get_submodule(name)
    places = [place for place, module in model.named_modules(remove_duplicate=False) if module is layer]
    for place in places:
        model.set_submodule(place, pair)
    try:
        with torch.no_grad():
            outputs = tensors_in(call(model.eval(), batch_of(ctx.task.example_inputs, 2)))
        if all(torch.isfinite(tensor).all() for tensor in outputs):
            return ""
        reason = "the outputs would be NaN or infinite"
    except Exception as error:  # of the user's own forward, which may read what a pair of layers does not have
        reason = f"afterwards {named_reason(error)}"
    for place in places:
        model.set_submodule(place, layer)
    return reason

"""Prune, low rank: replace a layer by two thin ones whose product is close to it.

Takes and gives a torch module. How much accuracy that costs depends on the rank; it needs training afterwards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

from .layers import check_finite, chosen

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    budget: float | None = None  # or: as many as take this share of the layer's parameters
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
        skipped: dict[str, str] = {}
        for name, layer in self._candidates(model).items():
            matrix = layer.weight.detach().flatten(1)
            u, s, v = _decomposed(matrix)
            rank = self._rank(s, matrix)
            before, after = matrix.numel(), rank * sum(matrix.shape)
            if after >= before:
                skipped[name] = f"rank {rank} would take {after} parameters instead of {before}"
            elif reason := _replace(model, name, _pair(layer, u[:, :rank], s[:rank], v[:rank]), ctx):
                skipped[name] = reason
            else:
                ranks[name], errors[name] = rank, _lost(s, rank)
        reasons = [f"'{name}' stays as it is: {reason}" for name, reason in skipped.items()]
        if not ranks:
            raise StageError(
                "no layer of this model gets smaller by a low rank: "
                + ("; ".join(reasons[:4]) or "it has no linear layer or ungrouped 2-d convolution of its own weights")
            )
        ctx.record(layers_replaced=len(ranks), ranks=ranks, relative_errors=errors, skipped=list(skipped))
        worst = max(errors, key=errors.__getitem__)
        ctx.note(
            f"{len(ranks)} layers became two of rank {min(ranks.values())} to {max(ranks.values())}; the weights of "
            f"'{worst}' changed most, by {errors[worst]:.0%}"
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

    def _rank(self, values: Tensor, matrix: Tensor) -> int:
        if self.rank is not None:
            return min(self.rank, len(values))
        if self.budget is not None:
            return max(1, int(self.budget * matrix.numel() / sum(matrix.shape)))
        assert self.energy is not None
        kept = (values**2).cumsum(0) / (values**2).sum().clamp(min=1e-30)
        return min(len(values), int((kept < self.energy).sum()) + 1)


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and Vᵀ of a matrix, in double precision while they are computed."""
    import torch

    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype)


def _lost(values: Tensor, rank: int) -> float:
    """The Frobenius norm of what is cut off, relative to the whole."""
    return float(values[rank:].norm() / values.norm().clamp(min=1e-30))


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
        reason = f"{type(error).__name__} afterwards: {str(error).strip().partition(chr(10))[0]}"
    for place in places:
        model.set_submodule(place, layer)
    return reason

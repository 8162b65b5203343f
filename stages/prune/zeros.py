"""Zeros: what magnitude, gradient and nm have in common. They leave plain zeros in the dense weights.

A module that lost weights says so in an attribute, `optpipe.training.KEEPS_ZEROS`, so that later training leaves them
at zero. Nothing is wrapped: no masks, hooks or parametrisations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError

from .layers import Scope, chosen

if TYPE_CHECKING:
    from torch import Tensor, nn

HONEST = (
    "zeros neither shrink a dense file nor speed up dense kernels; they shrink what is downloaded compressed, "
    "which compressed_bytes tells"
)


def weights_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The weight matrices and kernels of every layer that can lose some, by the layer's name and the parameter's.

    A parameter that two layers share is that of the first. Embeddings are left out: each of their rows is read alone.
    """
    from torch import nn

    convolutions = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
    found: dict[str, dict[str, nn.Parameter]] = {}
    seen: set[int] = set()
    for layer, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.MultiheadAttention, nn.RNNBase, *convolutions)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and "bias" not in name and id(parameter) not in seen:
                seen.add(id(parameter))
                found.setdefault(layer, {})[name] = parameter
    return found


def prunable(model: nn.Module, layers: list[str], keep: list[str]) -> dict[str, dict[str, nn.Parameter]]:
    """The weights of those layers that the patterns choose; StageError if there are none."""
    weights = weights_of(model)
    names = chosen(weights, layers, keep)
    if not names:
        raise StageError(
            "this model has no convolution, linear, attention or recurrent layer whose weights could be pruned"
            if not weights
            else f"keep={keep} leaves no layer to prune; this model has {len(weights)}, for example {list(weights)[:3]}"
        )
    return {name: weights[name] for name in names}


def least(scores: dict[str, dict[str, Tensor]], sparsity: float, scope: Scope) -> dict[str, dict[str, Tensor]]:
    """Where the `sparsity` smallest scores are, as masks; StageError for a layer that would lose every weight."""
    import torch

    flat = {layer: torch.cat([score.flatten() for score in named.values()]) for layer, named in scores.items()}
    if scope is Scope.model:
        gone = torch.split(_smallest(torch.cat(list(flat.values())), sparsity), [len(s) for s in flat.values()])
    else:
        gone = tuple(_smallest(score, sparsity) for score in flat.values())
    masks = {}
    for (layer, named), mask in zip(scores.items(), gone, strict=True):
        if mask.all():
            raise StageError(
                f"sparsity={sparsity} with scope={scope.value} would leave '{layer}' none of its {len(mask)} weights; "
                "lower sparsity or name the layer in keep"
            )
        parts = torch.split(mask, [score.numel() for score in named.values()])
        masks[layer] = {name: part.view(score.shape) for (name, score), part in zip(named.items(), parts, strict=True)}
    return masks


def write(model: nn.Module, masks: dict[str, dict[str, Tensor]], ctx: Context) -> None:
    """Set the masked weights to zero for good, and record how sparse the model really is."""
    import torch

    from optpipe.training import KEEPS_ZEROS

    shares: dict[str, float] = {}
    zeros = total = 0
    for layer, named in masks.items():
        module = model.get_submodule(layer)
        setattr(module, KEEPS_ZEROS, tuple(named))
        written = [getattr(module, name) for name in named]
        for weight, mask in zip(written, named.values(), strict=True):
            with torch.no_grad():  # in place: shared weights stay shared
                weight.masked_fill_(mask, 0.0)
        found, size = sum(int((weight == 0).sum()) for weight in written), sum(weight.numel() for weight in written)
        shares[layer], zeros, total = found / size, zeros + found, total + size
    if not zeros:
        raise StageError(f"not one of the {total} weights became zero; raise sparsity")
    everything = sum(parameter.numel() for parameter in model.parameters())
    ctx.record(sparsity=zeros / total, sparsity_of_model=zeros / everything, layers=len(masks), layer_sparsity=shares)
    ctx.note(
        f"{zeros / total:.1%} of the weights of {len(masks)} layers are zero, {zeros / everything:.1%} of all "
        f"parameters; {HONEST}"
    )


def check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be above 0 and below 1")


def _smallest(scores: Tensor, share: float) -> Tensor:
    """A mask of exactly that share of `scores`, the smallest."""
    import torch

    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.topk(scores, round(share * len(scores)), largest=False).indices] = True
    return mask

"""Folding: two layers in a row become one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .flow import Flow
from .trials import Rewrite, Trials

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


def spoken(module: nn.Module) -> str:
    """What kind of layer that is, in a pattern's name."""
    names: dict[type, str] = (
        {nn.Linear: "Linear"} | dict.fromkeys(CONVOLUTIONS, "Conv") | dict.fromkeys(TRANSPOSED, "ConvTranspose")
    )
    names |= dict.fromkeys(NORMS, "BatchNorm")
    return names.get(type(module), type(module).__name__)


def fold_norms(trials: Trials, flow: Flow) -> list[Rewrite]:
    """Fold every batch norm into the layer before it, else into the one behind it, where nothing else reads between.

    Jacob et al. 2018, https://arxiv.org/abs/1712.05877, §3.2.
    """
    modules = dict(trials.model.named_modules())
    norms = [name for name, module in modules.items() if type(module) in NORMS]
    before = {reader: layer for layer, reader in _pairs(modules, flow, LAYERS, NORMS)}
    behind = dict(_pairs(modules, flow, NORMS, LAYERS))
    rewrites, taken = [], set[str]()
    for norm in norms:
        reasons: list[tuple[tuple[str, ...], str]] = []
        for first, second in ((before.get(norm), norm), (norm, behind.get(norm))):
            if first is None or second is None:
                continue
            layer = second if first == norm else first
            reason = _why_not_folded(modules, flow, first, second) or (
                f"another norm is folded into '{layer}'" if layer in taken else ""
            )
            reasons.append(((first, second), reason))
            if not reason:
                taken.add(layer)
                rewrites.append(_folded(trials.model, first, second))
                break
        else:
            alone = (norm,), "no convolution or linear layer is next to it"
            where, reason = reasons[0] if reasons else alone
            if flow.calls(norm):
                trials.refuse("+".join(spoken(modules[name]) for name in where), where, reason)
    return trials.make(rewrites)


def merge_layers(trials: Trials, flow: Flow) -> list[Rewrite]:
    """Merge a layer and the linear layer or 1×1 convolution that alone reads it, where that does not enlarge them."""
    modules = dict(trials.model.named_modules())
    rewrites, taken = [], set[str]()
    kinds = (nn.Linear, *CONVOLUTIONS)
    for first, second in _pairs(modules, flow, kinds, kinds):
        if type(modules[first]) is not type(modules[second]) or not _is_pointwise(modules[second]):
            continue
        if reason := _why_not_merged(modules, flow, first, second):
            trials.refuse(f"{spoken(modules[first])}+{spoken(modules[second])}", (first, second), reason)
        elif not taken & {first, second}:  # a third in a row has its turn in the next round
            taken |= {first, second}
            rewrites.append(_merged(trials.model, first, second))
    return trials.make(rewrites)


def _pairs(
    modules: dict[str, Any], flow: Flow, first: tuple[type, ...], second: tuple[type, ...]
) -> Iterator[tuple[str, str]]:
    """(module, one that reads its output), of those kinds: of a subclass nobody knows what it computes."""
    for name, module in modules.items():
        if type(module) in first:
            for reader in flow.readers(name):
                if reader in modules and type(modules[reader]) in second:
                    yield name, reader


def _why_not_folded(modules: dict[str, Any], flow: Flow, first: str, second: str) -> str:
    norm_name, layer_name = (first, second) if type(modules[first]) in NORMS else (second, first)
    norm, layer = modules[norm_name], modules[layer_name]
    if norm.running_mean is None:
        return f"'{norm_name}' has no running statistics: it normalises every batch by its own"
    if reason := flow.why_not_alone(first, second) or _shared(modules, layer_name):
        return reason
    if type(layer) is nn.Linear and flow.ranks(norm_name) != {2}:
        return f"'{norm_name}' does not normalise the features of '{layer_name}'"
    if layer_name == second:
        if type(layer) in TRANSPOSED:
            return f"'{second}' is a transposed convolution behind the norm"
        if type(layer) in CONVOLUTIONS and layer.padding not in ("valid", (0,) * len(layer.kernel_size)):
            return f"'{second}' pads its input by zeros, which the norm before it would have shifted"
    elif type(layer) in TRANSPOSED and layer.groups > 1:
        return f"'{first}' is a transposed convolution in groups"
    return ""


def _folded(model: nn.Module, first: str, second: str) -> Rewrite:
    is_before = type(model.get_submodule(first)) in NORMS
    norm_name, layer_name = (first, second) if is_before else (second, first)

    def change() -> None:
        norm: Any
        layer: Any
        norm, layer = model.get_submodule(norm_name), copy.deepcopy(model.get_submodule(layer_name))
        scale, shift = _affine(norm)
        weight = layer.weight.detach().double()
        bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        if is_before:  # W(s·x + t) + b = (W·s)x + (W·t + b)
            groups = getattr(layer, "groups", 1)
            parts = weight.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, …)
            rest = [1] * (parts.dim() - 3)
            bias = bias + (parts * shift.view(groups, 1, -1, *rest)).flatten(2).sum(2).flatten()
            weight = (parts * scale.view(groups, 1, -1, *rest)).flatten(0, 1)
        else:  # s(Wx + b) + t = (s·W)x + (s·b + t)
            rest = [1] * (weight.dim() - 2)
            weight = weight * (scale.view(1, -1, *rest) if type(layer) in TRANSPOSED else scale.view(-1, 1, *rest))
            bias = bias * scale + shift
        _write(layer, weight, bias)
        model.set_submodule(layer_name, layer)
        model.set_submodule(norm_name, nn.Identity())

    names = [spoken(model.get_submodule(name)) for name in (first, second)]
    return Rewrite("+".join(names), (first, second), change)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel of what `norm` computes when it does not train, float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _is_pointwise(module: Any) -> bool:
    """Whether it mixes features or channels and nothing else, place by place."""
    if type(module) not in CONVOLUTIONS:
        return type(module) is nn.Linear
    ones = (1,) * len(module.kernel_size)
    unpadded = module.padding in ("valid", "same", (0,) * len(ones))
    return module.kernel_size == module.stride == ones and unpadded and module.groups == 1


def _why_not_merged(modules: dict[str, Any], flow: Flow, first: str, second: str) -> str:
    one, two = modules[first], modules[second]
    if reason := flow.why_not_alone(first, second) or _shared(modules, first) or _shared(modules, second):
        return reason
    if getattr(one, "groups", 1) > 1:
        return f"'{first}' works in groups"
    apart, together = one.weight.numel() + two.weight.numel(), one.weight[0].numel() * two.weight.shape[0]
    return f"one layer would hold {together} weights, the two hold {apart}" if together > apart else ""


def _merged(model: nn.Module, first: str, second: str) -> Rewrite:
    def change() -> None:  # V(Wx + b) + c = (V·W)x + (V·b + c)
        layer: Any
        two: Any
        layer, two = copy.deepcopy(model.get_submodule(first)), model.get_submodule(second)
        mixing = two.weight.detach().double().flatten(1)
        weight = torch.tensordot(mixing, layer.weight.detach().double(), dims=1)
        bias = None if two.bias is None else two.bias.detach().double()
        if layer.bias is not None:
            bias = mixing @ layer.bias.detach().double() + (0.0 if bias is None else bias)
        _write(layer, weight, bias)
        size = "out_features" if type(layer) is nn.Linear else "out_channels"
        setattr(layer, size, getattr(two, size))
        model.set_submodule(first, layer)
        model.set_submodule(second, nn.Identity())

    names = [spoken(model.get_submodule(name)) for name in (first, second)]
    return Rewrite("+".join(names), (first, second), change)


def _write(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    kept = layer.weight
    layer.weight = nn.Parameter(weight.to(kept.dtype), requires_grad=kept.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(kept.dtype), requires_grad=kept.requires_grad)


def _shared(modules: dict[str, Any], name: str) -> str:
    """Why the weights of that layer cannot be replaced without enlarging the model; empty if they can."""
    own = {id(parameter) for parameter in modules[name].parameters()}
    for other, module in modules.items():
        if other != name and own & {id(parameter) for parameter in module.parameters(recurse=False)}:
            return f"'{name}' shares its weights with '{other}'"
    return ""

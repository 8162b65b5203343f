"""Tidying: what does nothing goes, and weights that are computed anew in every pass are computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .trials import Rewrite, Trials

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
POOLINGS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
PARAMETRISED = "Parametrised weight"


def drop_dropout(trials: Trials) -> list[str]:
    """Replace dropout, which does nothing outside training; return the names."""
    return _by_identities(trials, lambda module: type(module) in DROPOUTS)


def drop_identities(trials: Trials) -> list[str]:
    """Replace pooling over single places, and take identities out of every Sequential; return the names of both.

    What stays in a Sequential keeps its name.
    """
    dropped = _by_identities(trials, _is_pooling_of_one)
    rewrites = []
    for name, chain in trials.model.named_modules():
        gone = [child for child, module in chain.named_children() if type(module) is nn.Identity]
        if type(chain).forward is nn.Sequential.forward and 0 < len(gone) < len(chain._modules):
            where = tuple(f"{name}.{child}" if name else child for child in gone)
            rewrites.append(Rewrite("Identity", where, _leave_out(chain, gone)))
    return list(dict.fromkeys([*dropped, *(name for rewrite in trials.make(rewrites) for name in rewrite.where)]))


def materialise(trials: Trials) -> list[Rewrite]:
    """Store the weights that a parametrisation, such as weight norm or spectral norm, makes of what it stores."""
    model = trials.model
    rewrites = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            where = tuple(f"{name}.{tensor}" for tensor in module.parametrizations)
            if name:
                rewrites.append(Rewrite(PARAMETRISED, where, _stored(model, name)))
            else:
                trials.refuse(PARAMETRISED, where, "it belongs to the model itself, which is not replaced")
        for hook in module._forward_pre_hooks.values():  # the older kind
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                rewrites.append(Rewrite(PARAMETRISED, (f"{name}.{hook.name}",), _unhooked(module, hook)))
    return trials.make(rewrites)


def _by_identities(trials: Trials, chosen: Callable[[nn.Module], bool]) -> list[str]:
    model = trials.model

    def change(name: str) -> Callable[[], None]:
        return lambda: model.set_submodule(name, nn.Identity())

    rewrites = [
        Rewrite(type(module).__name__, (name,), change(name))
        for name, module in model.named_modules()
        if name and chosen(module)
    ]
    return [name for rewrite in trials.make(rewrites) for name in rewrite.where]


def _is_pooling_of_one(module: Any) -> bool:
    def are(value: object, number: int) -> bool:
        return value == number or (isinstance(value, tuple) and set(value) == {number})

    if type(module) not in POOLINGS or getattr(module, "return_indices", False):
        return False
    divisor = getattr(module, "divisor_override", None) in (None, 1)
    return are(module.kernel_size, 1) and are(module.stride, 1) and are(module.padding, 0) and divisor


def _leave_out(chain: nn.Module, children: list[str]) -> Callable[[], None]:
    def change() -> None:
        for child in children:
            delattr(chain, child)

    return change


def _stored(model: nn.Module, name: str) -> Callable[[], None]:
    def change() -> None:
        module = copy.deepcopy(model.get_submodule(name))
        shared = type(module)  # with every copy of it; the property that is removed next lies there
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        for tensor in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, tensor)
        model.set_submodule(name, module)

    return change


def _unhooked(module: nn.Module, hook: WeightNorm | SpectralNorm) -> Callable[[], None]:
    def change() -> None:
        (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, hook.name)

    return change

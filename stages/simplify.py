"""Simplify: rewrite a module into a smaller one that computes the same.

Takes and gives a torch module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn


@register("simplify/standard", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Standard:
    """Fold batch norm into the layer before it, and drop dropout and identities; outputs must stay equal.

    Folding as in Jacob et al. 2018, §3.2. Batch norm is found by the order in which modules run on the example
    inputs, so that only pairs are folded whose result nobody else reads.
    """

    fold_batch_norm: bool = True
    drop_dropout: bool = True  # the model can then no longer be regularised by it in later training
    drop_identities: bool = True
    tolerance: float = 1e-4  # largest difference of an output, as a share of the largest output

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be above 0")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import torch

        from optpipe.task import call, tensors_in

        model.eval()
        with torch.no_grad():
            before = tensors_in(call(model, ctx.task.example_inputs))
        folded = _fold_batch_norm(model, ctx) if self.fold_batch_norm else []
        dropped = _drop(model, dropout=self.drop_dropout, identities=self.drop_identities)
        with torch.no_grad():
            after = tensors_in(call(model, ctx.task.example_inputs))
        worst = max(
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in zip(before, after, strict=True)
        )
        if worst > self.tolerance:
            raise StageError(f"outputs changed by {worst:.2g} of their range, more than tolerance={self.tolerance:g}")
        ctx.record(folded_batch_norms=len(folded), dropped_modules=len(dropped), largest_difference=worst)
        ctx.note(f"folded {len(folded)} batch norms, dropped {len(dropped)} modules")
        return model


def _fold_batch_norm(model: nn.Module, ctx: Context) -> list[str]:
    """Fold every batch norm that alone reads the output of a convolution or linear layer; return their names."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    folded = []
    for layer_name, norm_name in _pairs(model, ctx):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        model.set_submodule(layer_name, fuse(layer, norm))  # type: ignore[arg-type, type-var]
        model.set_submodule(norm_name, nn.Identity())
        folded.append(norm_name)
    return folded


def _pairs(model: nn.Module, ctx: Context) -> list[tuple[str, str]]:
    """(layer, batch norm) where the norm's input is the layer's output and both run once in a forward pass.

    A layer whose output a third module reads too is left alone. What reads it outside any module, such as a sum
    written in `forward`, shows in the outputs, which are compared afterwards.
    """
    import torch
    from torch import nn

    from optpipe.task import call

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    made: dict[int, tuple[str, torch.Tensor]] = {}  # the tensor is kept so that its id stays taken
    readers: dict[str, list[str]] = {}
    calls: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> object:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            for value in inputs:
                if id(value) in made:
                    readers.setdefault(made[id(value)][0], []).append(name)
            if isinstance(module, layers) and isinstance(output, torch.Tensor):
                made[id(output)] = (name, output)

        return module.register_forward_hook(hook)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [watch(name, module) for name, module in leaves]
    with torch.no_grad():
        call(model, ctx.task.example_inputs)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    modules = dict(leaves)
    return [
        (layer, read_by[0])
        for layer, read_by in readers.items()
        if len(read_by) == 1 and isinstance(modules[read_by[0]], norms) and calls[layer] == calls[read_by[0]] == 1
        and modules[read_by[0]].running_mean is not None
    ]  # fmt: skip


def _drop(model: nn.Module, *, dropout: bool, identities: bool) -> list[str]:
    """Replace dropout by identities, and take identities out of every Sequential; return the names of both."""
    from torch import nn

    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    dropped = []
    for name, module in list(model.named_modules()):
        if dropout and isinstance(module, kinds):
            model.set_submodule(name, nn.Identity())
            dropped.append(name)
    for name, module in list(model.named_modules()):
        if identities and isinstance(module, nn.Sequential):
            kept = [child for child in module if not isinstance(child, nn.Identity)]
            if 0 < len(kept) < len(module):
                gone = [child for child, m in module.named_children() if isinstance(m, nn.Identity)]
                dropped += [f"{name}.{child}" for child in gone if f"{name}.{child}" not in dropped]
                model.set_submodule(name, nn.Sequential(*kept)) if name else None
    return dropped

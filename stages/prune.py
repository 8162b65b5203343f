"""Prune: make a module smaller by removing the parts that matter least.

Takes and gives a torch module. Accuracy falls to little better than chance until the model is trained again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn


@register("prune/channels", takes="torch", gives="torch", requires=("torch_pruning",), needs_recovery=True)
@dataclass(kw_only=True)
class Channels:
    """Remove whole channels, least important groups first, so that the dense model really shrinks.

    Layers whose channels depend on one another form a group and lose the same ones (DepGraph, Fang et al. 2023);
    a group's importance is the L2 norm of its weights.
    """

    ratio: float = 0.5  # share of channels removed from each group
    round_to: int = 8  # channels kept per layer are a multiple of this
    keep: list[str] = field(default_factory=list)  # module name patterns that are never touched

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; it must be at least 0 and below 1")
        if self.round_to < 1:
            raise ValueError(f"round_to is {self.round_to}; it must be at least 1")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        import torch_pruning as tp

        from optpipe.task import batch_of

        before = _channels(model)
        if not before:
            raise StageError("this model has no convolution or linear layer whose channels could be removed")
        pruner = tp.BasePruner(
            model,
            example_inputs=batch_of(ctx.task.example_inputs, 2),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.0,
            pruning_ratio_dict=self._ratios(model),
            ignored_layers=_kept(model, self.keep) + _output_layers(model, ctx),
            # its defaults are dicts shared by every pruner of a process
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
        after = _channels(model)
        shrunk = [name for name in before if after[name] < before[name]]
        if not shrunk and self.ratio > 0:
            raise StageError(
                f"ratio={self.ratio} with round_to={self.round_to} removes no channel of this model, whose layers have "
                f"{min(before.values())} to {max(before.values())}; lower round_to or raise ratio"
            )
        kept = sum(after.values()) / sum(before.values())
        ctx.record(layers_pruned=len(shrunk), layers=len(before), channels_kept=kept)
        ctx.note(f"removed {1 - kept:.0%} of the channels, in {len(shrunk)} of {len(before)} layers")
        return model

    def _ratios(self, model: nn.Module) -> dict[nn.Module, float]:
        """The share to remove from each layer so that the nearest multiple of `round_to`, at least one, is kept.

        Torch-Pruning's own rounding leaves a layer of 32 whole where 16 are asked for.
        """
        ratios = {}
        for name, channels in _channels(model).items():
            kept = max(1, int(channels * (1 - self.ratio) / self.round_to + 0.5)) * self.round_to
            if kept < channels:
                # it keeps int(channels * (1 - ratio)): half a channel more cannot be rounded to one too few
                ratios[model.get_submodule(name)] = 1 - (kept + 0.5) / channels
        return ratios


def _channels(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer."""
    from torch import nn

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module.weight.shape[0] for name, module in model.named_modules() if isinstance(module, layers)}


def _kept(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """The modules that `patterns` name; StageError for a pattern that names none."""
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in modules):
            examples = list(_channels(model))[:2]
            raise StageError(
                f"keep names '{pattern}', which matches no module of this model; it has, for example, {examples}"
            )
    return [module for name, module in modules.items() if any(fnmatch(name, pattern) for pattern in patterns)]


def _output_layers(model: nn.Module, ctx: Context) -> list[nn.Module]:
    """The layers whose output the model returns: their channels are its classes."""
    import torch
    from torch import nn

    from optpipe.task import call, tensors_in

    last: list[tuple[nn.Module, torch.Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, _, out: last.append((m, out)))
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    ]
    with torch.no_grad():
        outputs = tensors_in(call(model, ctx.task.example_inputs))
    for handle in handles:
        handle.remove()
    # a view, or an activation, of a layer's output has its width
    widths = {tensor.shape[-1] for tensor in outputs} | {tensor.shape[1] for tensor in outputs if tensor.dim() > 1}
    exact = [module for module, out in last if any(out is tensor for tensor in outputs)]
    return exact or [module for module, out in last[-1:] if out.shape[-1] in widths or out.shape[1] in widths]

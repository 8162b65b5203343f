"""Prune, channels: make the layers of a model narrower.

Takes and gives a torch module. Accuracy falls to little better than chance until the model is trained again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.patterns import matching
from optpipe.registry import register

from .layers import Scope, channels_of, check_finite
from .loss_gradients import check_batches, mean_gradients

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from . import groups

HELD_OUT = 0.1  # share of the training data that judges the training between rounds


class Importance(Enum):
    """What a channel's weights must have much of to stay."""

    norm = "norm"  # L2 norm
    taylor = "taylor"  # |w · ∂loss/∂w|, what the loss loses to first order (Molchanov et al. 2019)
    hessian = "hessian"  # w² · (∂loss/∂w)², the diagonal of the Fisher matrix for the Hessian's (LeCun et al. 1990)


@register(
    "prune/channels",
    takes="torch",
    gives="torch",
    requires=("torch_pruning", "lightning_fabric"),
    needs_recovery=True,
)
@dataclass(kw_only=True)
class Channels:
    """Remove whole channels, least important ones first, so that the dense model really shrinks.

    Layers whose channels depend on one another form a group and lose the same ones (DepGraph, Fang et al. 2023). The
    parts of a grouped convolution, and attention heads, all lose the same number. After each removal the model must
    still answer in its old shapes; a group that does not allow it is put back, and named with its reason.
    """

    ratio: float = 0.5  # share of channels removed: from each group, or from all of them together
    round_to: int = 8  # channels kept per layer are a multiple of this
    importance: Importance = Importance.norm
    scope: Scope = Scope.layer
    keep: list[str] = field(default_factory=list)  # module name patterns that are never touched
    heads: bool = False  # where a layer's output is split into attention heads, remove whole ones
    rounds: int = 1  # in which the ratio is reached, with training between them
    epochs_between: int = 1
    learning_rate: float = 1e-3  # of the training between the rounds
    batches: int = 8  # of training data that gradients are measured on

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}; it must be at least 0 and below 1")
        for name in ("round_to", "rounds", "epochs_between"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        check_batches(self.batches)

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from optpipe.task import batch_of

        from .groups import Surgeon

        before = channels_of(model)
        if not before:
            raise StageError("this model has no convolution or linear layer whose channels could be removed")
        check_finite(model)
        kept = [model.get_submodule(name) for name in matching(dict(model.named_modules()), self.keep, "keep")]
        untouched = kept + _output_layers(model, ctx)
        inputs = batch_of(ctx.task.example_inputs, 2)
        whole: dict[str, int] = {}  # size of every group before the first round
        skipped: dict[str, str] = {}
        for number in range(1, self.rounds + 1):
            surgeon = Surgeon(model, inputs, untouched)
            found = surgeon.groups(self._ranking(model, ctx))
            whole = whole or {group.name: group.channels for group in found}
            skipped |= {group.name: group.refusal for group in found if group.refusal}
            if self.heads:
                skipped |= _without_heads(model, surgeon)
            free = [group for group in found if group.name not in skipped]
            skipped |= surgeon.remove(self._plan(free, whole, self.ratio * number / self.rounds))
            if number < self.rounds:
                self._train(model, ctx)
        self._report(before, channels_of(model), skipped, ctx)
        return model

    def _ranking(self, model: nn.Module, ctx: Context) -> groups.Importance:
        """How much each channel of a group matters."""
        import torch_pruning as tp

        if self.importance is Importance.norm:
            norm: groups.Importance = tp.importance.GroupMagnitudeImportance(p=2)
            return norm
        is_taylor = self.importance is Importance.taylor
        gradients = mean_gradients(model, ctx, self.batches, power=1 if is_taylor else 2)
        score = tp.importance.GroupTaylorImportance() if is_taylor else tp.importance.GroupHessianImportance()

        def rank(members: object) -> torch.Tensor | None:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            ranks: torch.Tensor | None = score(members)
            model.zero_grad()
            return ranks

        return rank

    def _plan(self, free: list[groups.Group], whole: dict[str, int], ratio: float) -> list[groups.Removal]:
        """What to remove from each group to have lost `ratio` of what there was before the first round."""
        import torch

        from .groups import Removal

        plain = [group for group in free if not (self.heads and group.heads)]
        wanted = {group.name: whole[group.name] * (1 - ratio) for group in free}
        if self.scope is Scope.model and plain:
            wanted |= _ranked_together(plain, whole, ratio)
        removals = []
        for group in free:
            whole_heads = group not in plain
            # what is kept is a multiple of `step`, and every index stands for `cost` channels
            cost = group.size if whole_heads else group.parts
            step = group.size if whole_heads else math.lcm(self.round_to, group.parts)
            surplus = (group.channels - max(1, int(wanted[group.name] / step + 0.5)) * step) // cost
            if surplus <= 0:
                continue
            if wanted[group.name] < 0.5 and self.scope is Scope.layer:
                raise StageError(
                    f"ratio={self.ratio} would leave none of the {whole[group.name]} channels of '{group.name}'; lower "
                    "ratio or name the layer in keep"
                )
            ranks = group.importance.mean(1 if whole_heads else 0)
            removals.append(Removal(group, torch.topk(ranks, surplus, largest=False).indices.tolist(), whole_heads))
        return removals

    def _train(self, model: nn.Module, ctx: Context) -> None:
        """Let the model recover from a round, by the task's own loss; the best epoch on held-out data is kept."""
        from optpipe.held_out import HeldOutLoss, hold_out
        from optpipe.training import Schedule, fit

        train, held = hold_out(ctx.task.train, HELD_OUT, ctx.seed)

        def loss(_: Any, outputs: Any, target: Any) -> Tensor:
            return ctx.task.loss(ctx.task.selected(outputs), target)

        schedule = Schedule(epochs=self.epochs_between, learning_rate=self.learning_rate)
        fit(
            model, train, loss, schedule, fabric=ctx.fabric, judge=HeldOutLoss(held, loss),
            description="training between rounds",
        )  # fmt: skip

    def _report(self, before: dict[str, int], after: dict[str, int], skipped: dict[str, str], ctx: Context) -> None:
        """Record what was removed and what could not be; StageError if that is all."""
        reasons = [f"'{name}' stays as it is: {reason}" for name, reason in skipped.items()]
        shrunk = [name for name in before if after[name] < before[name]]
        if not shrunk and self.ratio > 0:
            raise StageError(
                f"ratio={self.ratio} with round_to={self.round_to} removes no channel of this model, whose layers have "
                f"{min(before.values())} to {max(before.values())}; "
                + ("; ".join(reasons) if reasons else "lower round_to or raise ratio")
            )
        kept = sum(after.values()) / sum(before.values())
        ctx.record(layers_pruned=len(shrunk), layers=len(before), channels_kept=kept)
        ctx.note(f"removed {1 - kept:.0%} of the channels, in {len(shrunk)} of {len(before)} layers")
        if skipped:
            ctx.record(skipped=list(skipped))
        for reason in reasons:
            ctx.note(reason)


def _ranked_together(free: list[groups.Group], whole: dict[str, int], ratio: float) -> dict[str, float]:
    """How many channels each group keeps if the least important of all of them go.

    Importances are those of a channel relative to the mean of its group, which makes groups comparable.
    """
    import torch

    ranks = torch.cat([group.importance.mean(0) for group in free])
    owner = torch.cat([torch.full((group.size,), i) for i, group in enumerate(free)])
    cost = torch.tensor([group.parts for group in free])[owner]
    surplus = sum(group.channels - whole[group.name] * (1 - ratio) for group in free)
    order = torch.argsort(ranks, stable=True)
    gone = order[cost[order].cumsum(0) <= surplus]
    return {group.name: group.channels - group.parts * int((owner[gone] == i).sum()) for i, group in enumerate(free)}


def _without_heads(model: nn.Module, surgeon: groups.Surgeon) -> dict[str, str]:
    """The attention modules that cannot lose whole heads; StageError if there is no attention at all."""
    from torch import nn

    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if not attention and not surgeon.heads:
        raise StageError(
            "heads=true, but no linear layer of this model gives an output that is split into heads; set heads=false"
        )
    return dict.fromkeys(attention, "nn.MultiheadAttention ties its heads to its width, so it keeps all of them")


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

"""Quantize, qat: train the model with its tensors rounded as they will be, then store it in int8.

Takes and gives a torch module; the one it gives is a graph with quantise operators (PT2E).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register
from optpipe.schedule import Schedule

from .engines import Placement, unmet
from .static import Granularity, Signedness

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule

    from optpipe.checkpoint import Checkpoint
    from optpipe.target import Target


@register("quantize/qat", takes="torch", gives="torch", requires=("torchao", "lightning_fabric"))
@dataclass(kw_only=True)
class Qat(Schedule):
    """Quantisation-aware training (Jacob et al. 2018, §3) with the baseline as teacher.

    Ranges start from calibration data and follow moving averages; gradients pass straight through the rounding
    (Bengio et al. 2013). Batch norm is trained as if it were folded. Which epoch is kept, or the model as it was
    calibrated, is decided on a slice of the training data.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    temperature: float = 4.0  # as of distill/logits
    alpha: float = 0.7  # weight of the teacher against the labels
    held_out: float = 0.1  # share of the training data that picks the best epoch
    freeze_after: int = 0  # epoch after which ranges and batch norm's statistics stay; 0 takes two thirds of them all
    weights: Granularity = Granularity.per_channel
    signedness: Signedness = Signedness.auto
    placement: Placement = Placement.auto  # as of quantize/static
    keep: list[str] = field(default_factory=list)  # layer name patterns that stay float
    checkpoint: str | None = None  # folder of the state to go on from, and to keep; the step's own without one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes > 1:
            raise ValueError(f"processes is {self.processes}; quantize/qat trains in one")
        if self.checkpointing:
            raise ValueError("checkpointing is set; quantize/qat trains a graph, which has no modules to compute again")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        for name, low, high in (("alpha", -1e-9, 1 + 1e-9), ("held_out", 0, 1)):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.freeze_after < 0:
            raise ValueError(f"freeze_after is {self.freeze_after}; it must not be negative")

    def problems(self, target: Target) -> list[str]:
        return unmet(self, target)

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        from .torchao_patterns import patterns_once

        with patterns_once():
            return self._trained(model, ctx)

    def _trained(self, model: nn.Module, ctx: Context) -> nn.Module:
        import copy

        from optpipe.held_out import HeldOutLoss, hold_out
        from optpipe.imitation import imitation, teacher_of
        from optpipe.training import fit

        from .fakequant import calibrate_rounded, freeze, prepare_training, ranges_kept
        from .posttraining import convert

        prepared, quantizer = prepare_training(model, self, ctx)
        calibrate_rounded(prepared, quantizer, ctx)
        train, held = hold_out(ctx.task.train, self.held_out, ctx.seed)
        loss = imitation(teacher_of(ctx), ctx.task, alpha=self.alpha, temperature=self.temperature)
        untrained, held_out_loss = copy.deepcopy(prepared.state_dict()), HeldOutLoss(held, loss)

        def judge(rounded: nn.Module) -> float:
            with ranges_kept(prepared):
                return held_out_loss(rounded)

        before = judge(prepared)
        frozen = self.freeze_after or max(1, round(self.epochs * 2 / 3))
        history = fit(
            prepared, train, loss, self, fabric=ctx.fabric, judge=judge, description="training with rounding",
            on_epoch=lambda epoch: freeze(prepared) if epoch > frozen else None, checkpoint=self._checkpoint(ctx),
        )  # fmt: skip
        best = self._best(prepared, untrained, before, history.scores)
        ctx.record(best_epoch=best, frozen_after=frozen)
        history.tell(ctx, self.checkpoint)
        kept = f"kept epoch {best} of {len(history.losses)}" if best else "no epoch was better than calibration alone"
        ctx.note(f"{kept}, by the loss on held-out training data")
        return convert(prepared, quantizer, ctx)

    def _checkpoint(self, ctx: Context) -> Checkpoint:
        """Where the training is kept after every epoch, and what it depends on beside its schedule."""
        from pathlib import Path

        from optpipe.checkpoint import Checkpoint, data_of
        from optpipe.forms.torch import content_hash

        own = ("held_out", "alpha", "temperature", "freeze_after", "weights", "signedness", "placement", "keep")
        of = {name: str(getattr(self, name)) for name in own}
        of |= {"method": "qat", "data": data_of(ctx.task), "teacher": content_hash(ctx.baseline), "seed": str(ctx.seed)}
        folder = Path(self.checkpoint) if self.checkpoint else ctx.checkpoints
        return Checkpoint(folder=folder, of=of, is_spare=not self.checkpoint)

    def _best(self, prepared: GraphModule, untrained: dict[str, object], before: float, scores: list[float]) -> int:
        """The epoch that is kept, counted from 1; 0, and the calibrated state put back, if training did not help."""
        best = max(range(len(scores)), key=lambda i: scores[i])
        if scores[best] > before:
            return best + 1
        prepared.load_state_dict(untrained)
        return 0

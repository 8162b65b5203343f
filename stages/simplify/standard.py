"""Simplify: rewrite a module into a smaller one that computes the same.

Takes and gives a torch module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn

    from .trials import Rewrite, Trials


@register("simplify/standard", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Standard:
    """Select outputs, fold and merge layers, drop what does nothing; what the model still returns must stay equal.

    Every rewrite is proven on samples of validation and calibration, and undone alone if it does not hold. Batch norm
    is folded as in Jacob et al. 2018, §3.2. Which layers follow one another is seen while the model runs, so that only
    those become one whose result nobody else reads.
    """

    outputs: list[str] = field(default_factory=list)  # that the model still returns; by default the task's, if any
    fold_batch_norm: bool = True  # into the layer before or behind it; see keep_norm for recipes that train afterwards
    merge_linear: bool = True  # linear layers, and 1×1 convolutions, with nothing between them, where that is smaller
    materialise: bool = True  # weight norm, spectral norm and other parametrisations become plain weights
    use_sdpa: bool = True  # attention written by hand becomes torch's; dropout inside it is then gone from training too
    drop_dropout: bool = True  # the model can then no longer be regularised by it in later training
    drop_identities: bool = True
    drop_unused: bool = True  # modules and parameters that nothing reads, neither now nor in training
    tolerance: float = 1e-4  # largest difference of an output, as a share of the largest output

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be above 0")
        if twice := sorted({name for name in self.outputs if self.outputs.count(name) > 1}):
            raise ValueError(f"outputs names {', '.join(twice)} twice; name each once")

    def run(self, model: nn.Module, ctx: Context) -> nn.Module:
        parameters = _parameters(model)
        trials = self._with_outputs(model.eval(), ctx)
        applied = self._plain(trials) + self._joined(trials)
        dropped = self._dropped(trials)
        unused = self._used(trials)
        _report_fusions(trials, [*applied, *unused], ctx)
        kinds = [rewrite.pattern for rewrite in applied]
        norms = sum("BatchNorm" in kind for kind in kinds)
        ctx.record(
            folded_batch_norms=norms,
            merged_layers=sum("+" in kind for kind in kinds) - norms,
            dropped_modules=len(dropped),
            dropped_parameters=parameters - _parameters(model),
            largest_difference=trials.difference(),
        )
        ctx.note(f"folded {norms} batch norms, dropped {len(dropped)} modules")
        return model

    def _with_outputs(self, model: nn.Module, ctx: Context) -> Trials:
        """`model` with the outputs that matter, and what proves that a rewrite does not change them."""
        from optpipe.task import leaves, tensors_in

        from . import outputs
        from .trials import Trials, returned, samples_of

        batches = samples_of(ctx.task)
        samples = [returned(model, inputs) for inputs in batches]
        names = self.outputs or ctx.task.outputs
        if names:
            places = outputs.places_of(samples, names)
            if ctx.task.outputs and (wanted := outputs.places_of(samples, ctx.task.outputs)) != places:
                raise StageError(f"outputs={self.outputs}, but the task's metric and loss read {wanted}; name the same")
            if not outputs.is_plain(samples[0], places):
                outputs.select_outputs(model, samples[0], names, places)
                _report_dropped(samples[0], places, ctx)
                samples = [outputs.selected(value, names) for value in samples]
        elif any(value is not None and not tensors_in(value) for _, value in leaves(samples[0])):
            if reason := outputs.why_not_tensors(samples):
                ctx.note(f"what is no tensor stays among the outputs: {reason}; name those that matter in `outputs`")
            else:
                outputs.keep_tensors(model)
                _report_dropped(samples[0], outputs.ways_to_tensors(samples[0]), ctx)
                samples = [outputs.tensors_only(value) for value in samples]
        trials = Trials(model, batches, samples, self.tolerance)
        if (worst := trials.difference()) > self.tolerance:
            raise StageError(
                f"two passes over the same inputs differ by {worst:.2g} of their range: nothing can be proven"
            )
        return trials

    def _plain(self, trials: Trials) -> list[Rewrite]:
        """Weights that are computed anew in every pass, and attention, become what torch has for them."""
        from .attention import drop_weights, use_sdpa, use_sdpa_of_transformers
        from .tidying import materialise

        made = materialise(trials) if self.materialise else []
        if self.use_sdpa:
            made += use_sdpa_of_transformers(trials, trials.flow())
            flow = trials.flow()
            made += drop_weights(trials, flow) + use_sdpa(trials, flow)
        return made

    def _joined(self, trials: Trials) -> list[Rewrite]:
        """Two layers become one, as long as there are such."""
        from .folding import fold_norms, merge_layers

        made = []
        while True:
            new = fold_norms(trials, trials.flow()) if self.fold_batch_norm else []
            new += merge_layers(trials, trials.flow()) if self.merge_linear else []
            made += new
            if not new:
                return made

    def _dropped(self, trials: Trials) -> list[str]:
        from .tidying import drop_dropout, drop_identities

        dropped = drop_dropout(trials) if self.drop_dropout else []
        return list(dict.fromkeys(dropped + (drop_identities(trials) if self.drop_identities else [])))

    def _used(self, trials: Trials) -> list[Rewrite]:
        from .dead_code import drop_unused

        return drop_unused(trials, trials.flow()) if self.drop_unused else []


def _report_dropped(sample: object, places: list[str], ctx: Context) -> None:
    from .outputs import dropped_table

    table = dropped_table(sample, places)
    count = sum(int(str(number)) for number in table.column("count"))
    ctx.table(table)
    ctx.record(dropped_outputs=count)
    ctx.note(f"the model returns {', '.join(places)}; {count} other outputs were dropped")


def _report_fusions(trials: Trials, applied: list[Rewrite], ctx: Context) -> None:
    from .fusions import activations, unread
    from .trials import Opportunity, opportunities_table

    norms = {rewrite.where[0]: rewrite.where[1] for rewrite in applied if rewrite.pattern.endswith("+BatchNorm")}
    flow = trials.flow()
    found = [Opportunity(rewrite.pattern, rewrite.where, "applied") for rewrite in applied]
    found += [*trials.refused.values(), *activations(trials.model, flow, norms), *unread(trials.model, flow)]
    counts = {status: sum(entry.status == status for entry in found) for status in ("applied", "refused")}
    ctx.record(
        fusions_found=len(found),
        fusions_applied=counts["applied"],
        fusions_refused=counts["refused"],
        fusions_left_to_runtime=len(found) - sum(counts.values()),
    )
    if found:
        ctx.table(opportunities_table(found))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

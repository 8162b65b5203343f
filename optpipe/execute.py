"""From a checked Plan to a finished run: build the task and the model, then hand them to the pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import sources, tracking
from optpipe.budget import AT_LEAST, LIMITS, Limits
from optpipe.plan import Plan, Step, forms_along, steps_of, write_config
from optpipe.schedule import Schedule
from optpipe.store.planned import kept

if TYPE_CHECKING:
    from torch import nn

    from optpipe.report import Report
    from optpipe.task import Task


def execute(
    plan: Plan, folder: Path, started: float, model: nn.Module | None = None, task: Task | None = None
) -> Report:
    """Run `plan` in `folder`. A model or task that is given replaces the one that the plan names.

    started: time.perf_counter() when this run began.
    Raises RecipeError before anything is recorded, StageError afterwards.
    """
    from torch import nn

    from optpipe import pipeline, preflight
    from optpipe.task import Task

    begin = time.perf_counter()
    given = {name: None for name, value in (("model", model), ("data", task)) if value is not None}
    plan = replace(plan, config=plan.config | given)  # what a caller made is in no configuration
    task = sources.build_task(plan.data, plan.subject) if task is None else task
    model = sources.build_model(plan.model, plan.subject) if model is None else model
    model_seconds = time.perf_counter() - begin
    if isinstance(task, Task) and isinstance(model, nn.Module):
        model = task.processed(model)
    preflight.check(model, task, plan.budget, plan.subject, plan.model.form)
    plan = replace(plan, device=_resolved(plan.device))
    write_config(plan.config, folder)
    tracker = tracking.tracker(plan.tracking, Path.cwd())
    return pipeline.run(plan, model, task, folder, tracker, started, model_seconds)


def _resolved(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def described(plans: Sequence[Plan]) -> str:
    """Those of a sweep each behind what they do not share."""
    said = []
    for plan in plans:
        own = [text for text in plan.overrides if not all(text in other.overrides for other in plans)]
        said += [f"{' '.join(own)}:"] if own else []
        said.append(describe(plan))
    return "\n".join(said)


def describe(plan: Plan) -> str:
    """The plan in lines of text, for dry_run=true."""
    stored = kept(plan)
    lines = [f"{plan.subject}: {len(plan.entries)} steps for {plan.target.runtime}, {plan.target.threads} thread(s)"]
    for number, (entry, before, after) in enumerate(forms_along(plan.entries, plan.model.form), 1):
        name = f"{entry.key} ({entry.info.name})" if isinstance(entry, Step) else entry.key
        known = "  in the store" if entry.key in stored else ""
        lines.append(f"  {number}. {name:<40} {_forms(before)} -> {_forms(after)}{known}")
        for branch in () if isinstance(entry, Step) else entry.branches:
            lines.append(f"       or {', '.join(f'{step.key} ({step.info.name})' for step in branch)}")
        for method, reason in () if isinstance(entry, Step) else entry.absent:
            lines.append(f"       without {method}: {reason}")
    lines.append(f"  rehearsal: {_rehearsal(plan, stored)}")
    limits = [_limits("", plan.budget), *(_limits(f"{k}.", v) for k, v in plan.budget.stages.items())]
    budget = ", ".join(filter(None, limits)) or "no limits"
    lines.append(f"  budget: {budget}, policy {plan.budget.policy.value}")
    lines.append(f"  model: {plan.model.name}; data: {plan.data.factory}")
    if stored:
        lines.append("  in the store: not computed again, unless code or data have changed since")
    lines.append("  nothing was run (dry_run=true)")
    return "\n".join(lines)


def _rehearsal(plan: Plan, stored: set[str]) -> str:
    done = 0 if plan.rehearse else len(stored)
    if plan.is_rehearsed and done:
        if not any(isinstance(step.stage, Schedule) for step in steps_of(plan.entries[done:])):
            return "none, what trains is in the store (rehearse=true asks for one)"
        return f"from step {done + 1} on, on two batches, before it (rehearse=false does without)"
    if plan.is_rehearsed:
        return "the whole chain on two batches before the first step (rehearse=false does without)"
    return "none, as asked" if plan.rehearse is False else "none, no stage trains (rehearse=true asks for one)"


def _forms(forms: frozenset[str]) -> str:
    return " or ".join(sorted(forms))


def _limits(prefix: str, limits: Limits) -> str:
    """As in \"quality_drop ≤ 0.01, speedup ≥ 2\"."""
    signs = {name: "≥" if name in AT_LEAST else "≤" for name in LIMITS}
    return ", ".join(f"{prefix}{name} {signs[name]} {limit:g}" for name, limit in limits.limits().items())

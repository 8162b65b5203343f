"""The same run from Python, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.report import Final, Measurement, NotMeasured

if TYPE_CHECKING:
    from torch import nn

    from optpipe.deployed import DeployedModel
    from optpipe.report import Latency, Report
    from optpipe.task import Task


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `optimize` found out. Reductions compare the final model with the model that was given."""

    folder: Path
    report: Report
    model: DeployedModel  # NumPy arrays in and out
    size_reduction: float | NotMeasured  # bytes of the given weights / bytes of the deployed file
    latency: Latency | NotMeasured  # at batch 1 on the target, with `speedup` against the given model
    quality_delta: float | NotMeasured  # a point is 0.01


def optimize(
    model: nn.Module | None = None,
    task: Task | None = None,
    *,
    recipe: str = "edge_int8",
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    output: str | Path | None = None,
) -> Result:
    """Run `recipe` on `model` and `task`, as `python -m optpipe +recipe=…` does, and return what came out.

    model, task: by default those that the configuration names. The model given is not changed.
    overrides: as on the command line, for example ["prune.ratio=0.3", "measure=quick"].
    output: the run's folder; by default one under outputs/runs.
    Raises RecipeError before any work, StageError for the stage that failed.
    """
    import copy
    import time

    from optpipe import compose, execute
    from optpipe.command import Command
    from optpipe.deployed import load

    started = time.perf_counter()
    command = Command(overrides=[f"+recipe={recipe}", *overrides], config_dir=Path(config_dir) if config_dir else None)
    compose.prepare(command)
    config = compose.composed(command.overrides, command)
    plan = compose.plan(
        config,
        recipe=recipe,
        overrides=command.overrides,
        subject=command.subject,
        command=_again(model is not None, task is not None, recipe, overrides, config_dir),
    )
    folder = Path(output or f"outputs/runs/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
    folder.mkdir(parents=True, exist_ok=True)
    report = execute.execute(plan, folder, started, copy.deepcopy(model), task)
    baseline, final = report.baseline, report.final
    assert isinstance(baseline, Measurement) and isinstance(final, Final)
    measured = final.measurement
    return Result(
        folder=folder,
        report=report,
        model=load(folder),
        size_reduction=_ratio(baseline.size_bytes, measured.size_bytes),
        latency=measured.headline() or _why_no_latency(measured),
        quality_delta=NotMeasured("no quality")
        if isinstance(measured.quality, NotMeasured)
        else measured.quality.delta,
    )


def _again(
    model_given: bool, task_given: bool, recipe: str, overrides: Sequence[str], config_dir: str | Path | None
) -> str:
    """What repeats the run, in words: a model and a task that the caller made are in no configuration."""
    given = [name for name, is_given in (("model", model_given), ("task", task_given)) if is_given]
    words = [*given, f"recipe={recipe!r}", f"overrides={list(overrides)!r}"]
    words += [f"config_dir={str(config_dir)!r}"] if config_dir else []
    origin = f", with the {' and the '.join(given)} of the calling program" if given else ""
    return f"Called from Python: optpipe.optimize({', '.join(words)}){origin}"


def _why_no_latency(measured: Measurement) -> NotMeasured:
    return measured.latency if isinstance(measured.latency, NotMeasured) else NotMeasured("batch 1 was not timed")


def _ratio(before: int | NotMeasured, after: int | NotMeasured) -> float | NotMeasured:
    if isinstance(before, NotMeasured):
        return before
    return after if isinstance(after, NotMeasured) else before / after

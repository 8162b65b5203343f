"""Who learns, from whom, and how that goes: the ways that the methods of this family share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import RecipeError, StageError, named_reason

from .settings import Learning

if TYPE_CHECKING:
    from torch import nn

    from optpipe.task import Batches
    from optpipe.training import History, Loss


def student_of(model: nn.Module, settings: Learning, ctx: Context) -> nn.Module:
    """The model to train: the one that the settings name, or `model`."""
    from torch import nn

    from optpipe.sources import call_factory

    if settings.student is None:
        return model
    try:
        student = call_factory("student", settings.student, settings.student_args, "this step")
    except RecipeError as error:
        raise StageError(error.problems[0]) from error
    if not isinstance(student, nn.Module):
        raise StageError(f"student '{settings.student}' returned {type(student).__name__}; it must return an nn.Module")
    ctx.note(
        f"the student is {settings.student}, {_millions(student)} weights; its teacher has {_millions(ctx.baseline)}"
    )
    return ctx.task.processed(student)


def learn(student: nn.Module, loss: Loss, settings: Learning, ctx: Context, description: str, **of: str) -> History:
    """Train `student` on all but a slice of the training data, and keep the epoch whose loss on that slice is least.

    of: what else the training depends on, as a checkpoint must know it.
    """
    from optpipe.checkpoint import Checkpoint, data_of
    from optpipe.forms.torch import content_hash
    from optpipe.held_out import HeldOutLoss, hold_out
    from optpipe.training import fit

    train, held = hold_out(ctx.task.train, settings.held_out, ctx.seed)
    _try(student, loss, held)
    of = {
        "method": description,
        "data": data_of(ctx.task),
        "teacher": content_hash(ctx.baseline),
        "held_out": str(settings.held_out),
        "seed": str(ctx.seed),
        **of,
    }
    folder = Path(settings.checkpoint) if settings.checkpoint else ctx.checkpoints
    history = fit(
        student,
        train,
        loss,
        settings,
        fabric=ctx.fabric,
        judge=HeldOutLoss(held, loss),
        description=description,
        checkpoint=Checkpoint(folder=folder, of=of, is_spare=not settings.checkpoint),
    )
    _tell(history, settings, ctx)
    return history


def _try(student: nn.Module, loss: Loss, held: Batches) -> None:
    """Raises StageError, before anything is trained, if the loss cannot take what the student gives."""
    import torch

    from optpipe.imitation import shapes_of
    from optpipe.task import call

    with torch.random.fork_rng(devices=[]):
        first = next(iter(held), None)
    if first is None:
        raise StageError("the train split is empty; it must hold at least one batch")
    inputs, target = first
    with torch.no_grad():
        try:
            outputs = call(student.eval().to("cpu"), inputs)
        except Exception as error:  # the user's own forward
            raise StageError(
                f"the student cannot take the task's inputs, {shapes_of(inputs)} ({named_reason(error)}); give "
                "one that does, for example by student_args"
            ) from error
        try:
            loss(inputs, outputs, target)
        except StageError:
            raise
        except Exception as error:  # the user's own loss
            raise StageError(
                f"the loss cannot judge the student, which gives {shapes_of(outputs)} where the targets are "
                f"{shapes_of(target)} ({type(error).__name__}: {error}); give the task a loss that takes both, or a "
                "student with other outputs"
            ) from error


def _tell(history: History, settings: Learning, ctx: Context) -> None:
    ctx.record(best_epoch=history.best_epoch)
    ctx.note(f"kept epoch {history.best_epoch} of {len(history.losses)}, the best on held-out training data")
    history.tell(ctx, settings.checkpoint)
    if settings.processes > 1:
        ctx.note(
            f"{settings.processes} processes shared every batch; batch norm, if any, saw the part of its own process"
        )


def _millions(model: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M"

"""The only training loop: distillation, fine-tuning and the zoo's baselines go through `fit`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optpipe.average import Average
from optpipe.checkpoint import Checkpoint, random_state, set_random_state
from optpipe.errors import StageError
from optpipe.machine import usable_cores
from optpipe.progress import say, track
from optpipe.recompute import recomputed
from optpipe.schedule import Precision as Precision
from optpipe.schedule import Rate as Rate
from optpipe.schedule import Schedule as Schedule
from optpipe.task import Batches, Inputs, call, size_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from optpipe.context import Context

Loss = Callable[[Inputs, Any, Any], Tensor]  # of (inputs, outputs, target): the mean over the samples of a batch
KEEPS_ZEROS = "keeps_zeros"  # attribute of a module: the names of its parameters whose zeros stay zero in training


@dataclass
class History:
    """What happened in `fit`."""

    losses: list[float] = field(default_factory=list)  # mean of each epoch
    scores: list[float] = field(default_factory=list)  # of `judge` after each epoch
    best_epoch: int = 0  # counted from 1; the model was left as it was after this epoch
    seconds: list[float] = field(default_factory=list, compare=False)  # that the steps of each epoch took
    continued_after: int = 0  # the epoch whose checkpoint the training went on from; 0 if it began anew
    updates: int = 0  # steps of the optimizer, and those that were left out
    overflows: list[int] = field(default_factory=list)  # per epoch: steps left out, as their fp16 gradients overflowed
    scales: list[float] = field(default_factory=list)  # of the loss in fp16: the first one, and after each change

    @property
    def stopped_early(self) -> bool:
        return self.best_epoch < len(self.losses)

    @property
    def overflow_rate(self) -> float:
        return sum(self.overflows) / max(1, self.updates)

    @property
    def scale_is_stable(self) -> bool:
        """Whether no step of the last epoch overflowed."""
        return not self.overflows[-1:] or self.overflows[-1] == 0

    def tell(self, ctx: Context, checkpoint: str | None) -> None:
        """Record the losses, and what became of a checkpoint and of fp16's loss scale.

        checkpoint: the folder that was asked for.
        """
        ctx.record(epochs=len(self.losses), losses=self.losses, epoch_seconds=self.seconds)
        if self.continued_after:
            ctx.note(
                f"went on after epoch {self.continued_after}, from the checkpoint in {checkpoint or ctx.checkpoints}"
            )
        elif checkpoint:
            ctx.note(f"the training began anew: there was no state of one in {checkpoint}")
        if self.scales:
            ctx.record(
                overflow_rate=self.overflow_rate, loss_scales=self.scales, loss_scale_stable=self.scale_is_stable
            )
            state = "stable" if self.scale_is_stable else "not stable yet: steps of the last epoch overflowed"
            ctx.note(
                f"fp16: {sum(self.overflows)} of {self.updates} steps overflowed and were left out; the loss scale "
                f"went from {self.scales[0]:g} to {self.scales[-1]:g} and is {state}"
            )


@dataclass(kw_only=True)
class Training:
    """What `fit` was asked for."""

    model: nn.Module
    batches: Batches
    loss: Loss
    schedule: Schedule
    judge: Callable[[nn.Module], float] | None
    description: str
    on_epoch: Callable[[int], None] | None
    after_step: Callable[[], None] | None
    checkpoint: Checkpoint | None


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    schedule: Schedule,
    *,
    fabric: Fabric | None = None,
    judge: Callable[[nn.Module], float] | None = None,
    description: str = "training",
    on_epoch: Callable[[int], None] | None = None,
    after_step: Callable[[], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Train `model` in place and leave it, in eval mode and on the CPU, as it was after its best epoch.

    fabric: names the device; without it that is the CPU.
    judge: score of the model after an epoch, higher is better; without it the last epoch counts as the best.
    on_epoch: called at the start of each epoch with its number, from 1; the model is in train mode.
    after_step: called after each step of the optimizer, for example to put back zeros that must stay.
    checkpoint: where the state is kept after each epoch until the training has ended, and read from at its beginning.
    Raises StageError if a loss is not a finite number, or 0 throughout an epoch.
    """
    training = Training(
        model=model, batches=batches, loss=loss, schedule=schedule, judge=judge, description=description,
        on_epoch=on_epoch, after_step=after_step, checkpoint=checkpoint and checkpoint.complete(model, schedule),
    )  # fmt: skip
    device = fabric.device if fabric else torch.device("cpu")
    if schedule.processes > 1:
        from optpipe.processes import train_in_processes

        history = train_in_processes(training, device)
    else:
        history = train(training, make_fabric(device, schedule.precision))
    if training.checkpoint:
        training.checkpoint.remove()
    model.to("cpu")
    model.eval()
    return history


def train(training: Training, fabric: Fabric) -> History:
    """`fit`, in this process or in each of several."""
    model, schedule, judge, checkpoint = training.model, training.schedule, training.judge, training.checkpoint
    torch.set_num_threads(max(1, usable_cores() // fabric.world_size))
    optimizer = torch.optim.AdamW(model.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)
    steps = sum(1 for _ in training.batches)
    if not steps:
        raise StageError("the train split is empty; it must hold at least one batch")
    rate = _rate(optimizer, schedule, schedule.epochs * math.ceil(steps / schedule.accumulate))
    loop = _Loop(training, fabric, optimizer, rate, steps)
    history, best = History(scales=loop.scale()), copy.deepcopy(model.state_dict())
    if checkpoint and (state := checkpoint.read()):
        history, best = loop.restore(state)
        if fabric.is_global_zero:
            say(f"{training.description} goes on after epoch {history.continued_after}, from {checkpoint.path}")
    with recomputed(model, schedule.checkpointing):
        for epoch in range(len(history.losses) + 1, schedule.epochs + 1):
            loop.epoch(epoch, history)
            with loop.judged():
                score = judge(model) if judge and fabric.is_global_zero else -math.inf
                history.scores.append(fabric.broadcast(score))
                if not judge or epoch == 1 or history.scores[-1] > history.scores[history.best_epoch - 1]:
                    history.best_epoch, best = epoch, copy.deepcopy(model.state_dict())
            if schedule.patience and epoch - history.best_epoch >= schedule.patience:
                break
            if checkpoint and fabric.is_global_zero:
                checkpoint.write(loop.state(history, best))
    model.load_state_dict(best)
    return history


class _Loop:
    """The parts of a training that move, and the way through one epoch."""

    def __init__(self, training: Training, fabric: Fabric, optimizer: Any, rate: Any, steps: int) -> None:
        self.training, self.fabric, self.rate, self.steps = training, fabric, rate, steps
        self.plain_optimizer = optimizer
        self.model, self.optimizer = fabric.setup(training.model, optimizer)
        self.zero_again = kept_zeros(training.model)
        self.scaler = getattr(fabric.strategy.precision, "scaler", None)
        self.average = Average(training.model, training.schedule.ema) if training.schedule.ema else None

    def epoch(self, epoch: int, history: History) -> None:
        """Train for one epoch, and add its mean loss to `history`."""
        self.training.model.train()
        if self.training.on_epoch:
            self.training.on_epoch(epoch)
        history.overflows.append(0)
        total, samples, begin = 0.0, 0, time.perf_counter()
        for group in _groups(self._batches(epoch), self.training.schedule.accumulate):
            sizes = [size_of(inputs) for inputs, _ in group]
            for i, (inputs, target) in enumerate(group):
                with self.fabric.no_backward_sync(self.model, enabled=i + 1 < len(group)):
                    value = self._backward(inputs, target, sizes[i] / sum(sizes), epoch)
                total += value * sizes[i]
            samples += sum(sizes)
            self._step(history)
        history.seconds.append(time.perf_counter() - begin)
        history.losses.append(total / samples)
        if total == 0:
            raise StageError(
                f"the loss was 0 in every batch of epoch {epoch}, so nothing can be learned from it; give the task a "
                "loss that fits its outputs, for example Task(loss=torch.nn.functional.mse_loss) for a regression"
            )
        self.training.model.eval()

    def _batches(self, epoch: int) -> Iterator[tuple[Inputs, Any]]:
        """The training data. The first of several processes reads it for all of them, whatever its randomness."""
        what = f"{self.training.description}, epoch {epoch} of {self.training.schedule.epochs}"
        if self.fabric.world_size == 1:
            yield from track(self.training.batches, what, self.steps)
            return
        with torch.random.fork_rng(devices=[]):  # the data come in the order that one process would see
            seed = self.fabric.broadcast(int(torch.randint(2**31, ())))
        if not self.fabric.is_global_zero:  # its dropout is its own, and the same when a training goes on
            torch.manual_seed(seed + self.fabric.global_rank)
        source = iter(track(self.training.batches, what, self.steps)) if self.fabric.is_global_zero else iter(())
        while (batch := self.fabric.broadcast(next(source, None))) is not None:
            yield batch

    def _backward(self, inputs: Inputs, target: Any, share: float, epoch: int) -> float:
        """Add the gradients of one batch, of which each process takes its part; return the loss of all of it."""
        world, size = self.fabric.world_size, size_of(inputs)
        if world > 1:
            inputs, target = (_part_of(value, size, self.fabric.global_rank, world) for value in (inputs, target))
            # gradients are averaged over the processes: this makes it the mean over samples where parts are unequal
            share *= world * len(range(self.fabric.global_rank, size, world)) / size
        inputs, target = self.fabric.to_device((inputs, target))
        value = self.training.loss(inputs, call(self.model, inputs), target)
        mine = value.detach() * (len(range(self.fabric.global_rank, size, world)) / size)
        whole = float(self.fabric.all_reduce(mine, reduce_op="sum"))
        if not math.isfinite(whole):
            precision = self.training.schedule.precision
            fp16 = ", or train with precision=bf16_mixed" if precision is Precision.fp16_mixed else ""
            raise StageError(
                f"the loss became {whole} in epoch {epoch}; "
                f"lower learning_rate (it is {self.training.schedule.learning_rate:g}) or look for NaN in the training "
                f"data{fp16}"
            )
        self.fabric.backward(value * share)
        return whole

    def _step(self, history: History) -> None:
        """One step of the optimizer by the gradients that were added up, and all that follows from it."""
        if clip := self.training.schedule.clip_norm:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        history.updates += 1
        scale = self.scale()
        overflowed = scale < history.scales[-1:]
        if scale != history.scales[-1:]:
            history.scales += scale
        if overflowed:  # the scaler has left the step out
            history.overflows[-1] += 1
            return
        self.zero_again()
        if self.training.after_step:
            self.training.after_step()
        if self.average:
            self.average.update(self.training.model)
        self.rate.step()

    def scale(self) -> list[float]:
        """The factor of the loss in fp16, now; empty in other precisions."""
        return [self.scaler.get_scale()] if self.scaler else []

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The model with the weights that count: their moving average where there is one."""
        if not self.average:
            yield
            return
        with self.average.applied(self.training.model):
            yield

    def state(self, history: History, best: dict[str, Any]) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {
            "model": self.training.model.state_dict(),
            "best": best,
            "optimizer": self.plain_optimizer.state_dict(),
            "rate": self.rate.state_dict(),
            "average": self.average and self.average.state(),
            "scaler": self.scaler and self.scaler.state_dict(),
            "history": asdict(history),
            "random": random_state(),
        }

    def restore(self, state: dict[str, Any]) -> tuple[History, dict[str, Any]]:
        """Become what `state` was taken of; return its history and the best weights."""
        self.training.model.load_state_dict(state["model"])
        self.plain_optimizer.load_state_dict(state["optimizer"])
        self.rate.load_state_dict(state["rate"])
        if self.average:
            self.average.restore(state["average"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        history = History(**state["history"])
        history.continued_after = len(history.losses)
        return history, state["best"]


def make_fabric(device: torch.device, precision: Precision, processes: int = 1) -> Fabric:
    """Lightning Fabric on `device`, or on `processes` of its kind; fp16 on a CPU too, which it would turn into bf16."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.strategies import DDPStrategy

    plugin = None
    if precision is not Precision.fp32:
        plugin = MixedPrecision("16-mixed" if precision is Precision.fp16_mixed else "bf16-mixed", device.type)
    if processes == 1:
        return Fabric(
            accelerator=device.type, devices=[device.index] if device.index is not None else 1, plugins=plugin
        )
    # a forked process hangs in its first parallel region if its parent has computed with several threads
    return Fabric(
        accelerator=device.type, devices=processes, strategy=DDPStrategy(start_method="spawn"), plugins=plugin
    )


def _rate(optimizer: torch.optim.Optimizer, schedule: Schedule, updates: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each of so many updates."""
    if schedule.rate is Rate.one_cycle:
        warmup = schedule.warmup
        if math.isclose(warmup * updates, 1):  # OneCycleLR then divides by the 0 steps of its first phase
            warmup = 1.5 / updates if updates > 2 else 0.75
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, schedule.learning_rate, total_steps=updates, pct_start=warmup
        )
    warmup = round(schedule.warmup * updates)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        left = max(0.0, (updates - update) / max(1, updates - warmup))
        if schedule.rate is Rate.cosine:
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return left if schedule.rate is Rate.linear else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _groups(batches: Iterable[tuple[Inputs, Any]], size: int) -> Iterator[list[tuple[Inputs, Any]]]:
    """So many batches at a time; the last group may be smaller."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group


def _part_of(value: Any, size: int, rank: int, world: int) -> Any:
    """Every `world`-th sample of a batch of `size`, from `rank` on; the first one where there is none."""
    if isinstance(value, dict):
        return {name: _part_of(item, size, rank, world) for name, item in value.items()}
    if (isinstance(value, Tensor) and value.dim() and len(value) == size) or _is_list_of(value, size):
        return value[rank::world] if rank < size else value[:1]
    if isinstance(value, (tuple, list)):
        return type(value)(_part_of(item, size, rank, world) for item in value)
    return value


def _is_list_of(value: Any, size: int) -> bool:
    """Whether `value` holds something of each sample; a list of as many tensors as samples would be one of batches."""
    return isinstance(value, list) and len(value) == size and not any(isinstance(item, Tensor) for item in value)


def kept_zeros(model: nn.Module) -> Callable[[], None]:
    """What sets the weights back to zero that a pruning stage made zero, to be called after every step of training."""
    pruned = [getattr(m, name) for m in model.modules() for name in getattr(m, KEEPS_ZEROS, ())]
    zeros = [(weight, weight == 0) for weight in pruned]

    def zero_again() -> None:
        with torch.no_grad():
            for weight, mask in zeros:
                weight.masked_fill_(mask, 0.0)

    return zero_again

"""The training loop: its settings do what they say, a killed training goes on, several processes are as one."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from optpipe import StageError
from optpipe.checkpoint import FILE, Checkpoint
from optpipe.held_out import HeldOutLoss, hold_out
from optpipe.training import Precision, Rate, Schedule, fit


def loss(_, outputs, target):
    return cross_entropy(outputs, target)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3)
    )


def plain_network() -> nn.Module:
    """Without what would make a batch in parts differ from the whole: batch norm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def loader(size: int = 8, shuffle: bool = True, n: int = 44) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 8, 8, generator=generator)
    targets = torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(images, targets), batch_size=size, shuffle=shuffle)


def trained(model: nn.Module, batches, tmp: Path | None = None, **settings):
    torch.manual_seed(1)
    settings = {"epochs": 2, "learning_rate": 1e-2, **settings}
    checkpoint = Checkpoint(folder=tmp, of={"data": "noise"}) if tmp else None
    judge = HeldOutLoss(loader(shuffle=False, n=16), loss)
    return fit(model, batches, loss, Schedule(**settings), judge=judge, checkpoint=checkpoint)


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(
        float((x - y).abs().max()) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_accumulated_batches_train_as_one_large_batch_does() -> None:
    whole, parts, ragged = plain_network(), plain_network(), plain_network()
    trained(whole, loader(16, shuffle=False))
    trained(parts, loader(8, shuffle=False), accumulate=2)
    trained(ragged, [*loader(8, shuffle=False)], accumulate=100)
    assert distance(whole, parts) < 1e-6
    trained(one := plain_network(), loader(44, shuffle=False))
    assert distance(one, ragged) < 1e-6  # though the last of its batches is smaller


def test_recomputing_layers_changes_nothing_but_what_is_remembered() -> None:
    models = [network() for _ in range(2)]
    for model, patterns in zip(models, ([], ["[0-3]"]), strict=True):
        trained(model, loader(), checkpointing=patterns)
    assert distance(*models) == 0  # running statistics too
    assert "forward" not in vars(models[1][0])
    with pytest.raises(StageError, match=r"checkpointing names 'blocks\.\*', which matches no module.*nearest names"):
        trained(network(), loader(), checkpointing=["blocks.*"])


def test_clipped_gradients_are_no_longer_than_asked() -> None:
    lengths = []
    model = plain_network()
    weights = list(model.parameters())

    def see(optimizer, _, __) -> None:
        lengths.append(float(torch.cat([weight.grad.flatten() for weight in weights]).norm()))

    hook = register_optimizer_step_pre_hook(see)
    trained(model, loader(), clip_norm=0.01)
    hook.remove()
    assert lengths and max(lengths) <= 0.01 + 1e-6


@pytest.mark.parametrize("rate", list(Rate))
def test_the_learning_rate_rises_and_falls_as_its_name_says(rate) -> None:
    seen = []
    hook = register_optimizer_step_pre_hook(lambda o, _, __: seen.append(o.param_groups[0]["lr"]))
    trained(plain_network(), loader(), rate=rate, warmup=0.25, epochs=4)
    hook.remove()
    top = seen.index(max(seen))
    assert len(seen) == 24 and 3 <= top <= 7 and seen[:top] == sorted(seen[:top])
    assert max(seen) == pytest.approx(1e-2, rel=0.05)
    assert seen[-1] == max(seen) if rate is Rate.constant else seen[-1] < 0.1 * max(seen)


def test_an_average_of_the_weights_is_what_is_kept() -> None:
    plain, smooth = plain_network(), plain_network()
    visited = []
    torch.manual_seed(1)
    schedule = Schedule(epochs=2, learning_rate=1e-2, ema=0.9, rate=Rate.constant)
    fit(smooth, loader(), loss, schedule, after_step=lambda: visited.append(copy.deepcopy(smooth[1].weight.detach())))
    trained(plain, loader(), rate=Rate.constant)
    average = visited[0] * 0
    for n, weight in enumerate([plain_network()[1].weight.detach(), *visited]):
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(smooth[1].weight, average, atol=1e-6)
    assert distance(plain, smooth) > 1e-4


def test_hooks_are_called_at_each_epoch_and_each_step() -> None:
    epochs, steps = [], []
    fit(plain_network(), loader(), loss, Schedule(epochs=3, learning_rate=1e-3, accumulate=4),
        on_epoch=epochs.append, after_step=lambda: steps.append(1))  # fmt: skip
    assert epochs == [1, 2, 3] and len(steps) == 3 * 2


@pytest.mark.parametrize("precision", [Precision.bf16_mixed, Precision.fp16_mixed])
def test_half_precision_learns_what_fp32_learns(precision) -> None:
    exact, half = plain_network(), plain_network()
    fp32, other = (trained(model, loader(), precision=p) for model, p in ((exact, Precision.fp32), (half, precision)))
    assert half[1].weight.dtype is torch.float32 and 0 < distance(exact, half) < 0.01
    assert other.losses == pytest.approx(fp32.losses, rel=0.01)
    assert other.scales[:1] == ([65536.0] if precision is Precision.fp16_mixed else [])


def test_steps_whose_fp16_gradients_overflow_are_left_out_and_counted() -> None:
    batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(8)]
    model, steps = nn.Linear(4, 1), []
    history = fit(
        model, batches, lambda _, outputs, target: 3e4 * mse_loss(outputs, target),
        Schedule(epochs=3, learning_rate=1e-3, precision=Precision.fp16_mixed), after_step=lambda: steps.append(1),
    )  # fmt: skip
    assert 0 < history.overflows[0] < 24 and 0 < history.overflow_rate < 1
    assert history.updates == 24 and len(steps) == 24 - sum(history.overflows)
    assert history.scales == [65536 / 2**i for i in range(sum(history.overflows) + 1)]
    assert history.scale_is_stable == (history.overflows[-1] == 0)


class Killed(Exception):
    pass


def killed_in(epoch: int):
    def on_epoch(now: int) -> None:
        if now == epoch:
            raise Killed

    return on_epoch


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema": 0.9, "rate": Rate.cosine}, {"precision": Precision.fp16_mixed}],
    ids=["plain", "average", "fp16"],
)
def test_a_killed_training_goes_on_to_the_same_weights(settings, tmp_path) -> None:
    settings = {"epochs": 4, **settings}
    undisturbed, resumed = network(), network()
    whole = trained(undisturbed, loader(), **settings)
    judge, killed = HeldOutLoss(loader(shuffle=False, n=16), loss), network()
    torch.manual_seed(1)
    with pytest.raises(Killed):
        fit(killed, loader(), loss, Schedule(learning_rate=1e-2, **settings), judge=judge,
            on_epoch=killed_in(3), checkpoint=Checkpoint(folder=tmp_path, of={"data": "noise"}))  # fmt: skip
    assert (tmp_path / FILE).exists()
    torch.manual_seed(99)  # another process would draw other numbers
    history = fit(resumed, loader(), loss, Schedule(learning_rate=1e-2, **settings), judge=judge,
                  checkpoint=Checkpoint(folder=tmp_path, of={"data": "noise"}))  # fmt: skip
    assert history.continued_after == 2
    assert (history.losses, history.scores) == (whole.losses, whole.scores)
    assert distance(undisturbed, resumed) == 0
    assert not (tmp_path / FILE).exists()  # it has ended


def test_a_checkpoint_of_another_training_is_refused(tmp_path) -> None:
    checkpoint = Checkpoint(folder=tmp_path, of={"data": "noise"})
    with pytest.raises(Killed):
        fit(
            network(),
            loader(),
            loss,
            Schedule(epochs=4, learning_rate=1e-2),
            on_epoch=killed_in(2),
            checkpoint=checkpoint,
        )
    with pytest.raises(StageError, match=r"another training: epochs 4 instead of 6; name another folder, or delete"):
        trained(network(), loader(), tmp_path, epochs=6)
    other = network()
    nn.init.zeros_(other[5].bias)
    with pytest.raises(StageError, match="another training: model "):
        trained(other, loader(), tmp_path, epochs=4)
    (tmp_path / FILE).write_bytes(b"half a file")
    with pytest.raises(StageError, match="cannot be read as the state of a training"):
        trained(network(), loader(), tmp_path, epochs=4)


def test_two_processes_train_as_one_does() -> None:
    one, two = plain_network(), plain_network()
    batches = loader(9)  # parts of five and four samples
    alone = trained(one, batches)
    together = trained(two, batches, processes=2)
    assert distance(one, plain_network()) > 1e-3
    assert distance(one, two) < 1e-5
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    assert together.best_epoch == alone.best_epoch


@pytest.mark.slow
def test_what_goes_wrong_in_another_process_is_told_here() -> None:
    model = plain_network()
    nn.init.constant_(model[1].weight, float("inf"))
    with pytest.raises(StageError, match=r"the loss became nan in epoch 1; lower learning_rate"):
        trained(model, loader(), processes=2)


def test_several_processes_on_missing_gpus_are_refused() -> None:
    from optpipe.processes import train_in_processes
    from optpipe.training import Training

    asked = Training(
        model=plain_network(), batches=loader(), loss=loss, judge=None, description="", on_epoch=None, after_step=None,
        checkpoint=None, schedule=Schedule(epochs=1, learning_rate=1e-3, processes=64),
    )  # fmt: skip
    with pytest.raises(StageError, match=r"processes is 64, but this machine has \d+ GPU"):
        train_in_processes(asked, torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accumulate": 0}, "accumulate is 0; it must be at least 1"),
        ({"processes": 0}, "processes is 0; it must be at least 1"),
        ({"warmup": 1.0}, r"warmup is 1\.0; it must be at least 0 and below 1"),
        ({"ema": 1.5}, r"ema is 1\.5; it must be at least 0 and below 1"),
        ({"clip_norm": -1.0}, r"clip_norm is -1\.0; it must not be negative"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(epochs=1, learning_rate=1e-3, **settings)


SHOT = """
import sys, time, torch
from pathlib import Path
import test_training as t

def judge(model):
    time.sleep(float(sys.argv[2]))
    return 0.0

model = t.network()
torch.manual_seed(1)
checkpoint = t.Checkpoint(folder=Path(sys.argv[1]), of={})
history = t.fit(model, t.loader(), t.loss, t.Schedule(epochs=6, learning_rate=1e-2), judge=judge, checkpoint=checkpoint)
torch.save({"model": model.state_dict(), "continued_after": history.continued_after}, Path(sys.argv[1]) / "end.pt")
"""


@pytest.mark.slow
def test_a_process_that_was_shot_goes_on(tmp_path) -> None:
    def start(folder: str, seconds: float) -> subprocess.Popen:
        (tmp_path / folder).mkdir(exist_ok=True)
        words = [sys.executable, "-c", SHOT, str(tmp_path / folder), str(seconds)]
        return subprocess.Popen(words, cwd=Path(__file__).parent)

    undisturbed, shot = start("whole", 0), start("shot", 1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "shot" / FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1.5)
    shot.send_signal(signal.SIGKILL)
    assert shot.wait() == -signal.SIGKILL and undisturbed.wait() == 0
    assert start("shot", 0).wait() == 0
    whole, resumed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "shot"))
    assert 1 <= resumed["continued_after"] < 6 and whole["continued_after"] == 0
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])


@pytest.mark.parametrize(("batches", "warmup"), [(10, 0.1), (4, 0.25), (2, 0.5)])
def test_a_warm_up_of_a_single_step_is_no_error(batches: int, warmup: float) -> None:
    data = [(torch.randn(4, 3), torch.randn(4, 1))] * batches
    model = nn.Linear(3, 1)
    history = fit(
        model,
        data,
        lambda _, outputs, target: mse_loss(outputs, target),
        Schedule(epochs=1, learning_rate=1e-3, warmup=warmup),
    )
    assert len(history.losses) == 1


def test_a_sampler_of_the_users_own_keeps_choosing() -> None:
    data = TensorDataset(torch.arange(40), torch.zeros(40))
    chosen = torch.utils.data.WeightedRandomSampler([1.0] * 20 + [0.0] * 20, 40)
    train, held = hold_out(DataLoader(data, batch_size=4, sampler=chosen), 0.2, seed=1)
    assert all(int(sample) < 20 for part in (train, held) for inputs, _ in part for sample in inputs)


def test_a_last_batch_that_was_to_be_dropped_is() -> None:
    data = TensorDataset(torch.arange(41), torch.zeros(41))
    train, _ = hold_out(DataLoader(data, batch_size=4, shuffle=True, drop_last=True), 0.1, seed=1)
    assert {len(inputs) for inputs, _ in train} == {4}


def test_one_batch_cannot_be_held_out() -> None:
    with pytest.raises(StageError, match="the train split holds 1 batches; it must hold at least 2"):
        hold_out([(torch.randn(4, 3), torch.randn(4, 1))], 0.1, seed=1)


def test_a_sampler_that_draws_more_than_once_is_left_alone() -> None:
    data = TensorDataset(torch.arange(20), torch.zeros(20))
    often = RandomSampler(data, replacement=True, num_samples=100)
    train, held = hold_out(DataLoader(data, batch_size=10, sampler=often), 0.2, seed=1)
    assert sum(len(inputs) for inputs, _ in train) == 80 and sum(len(inputs) for inputs, _ in held) == 20


def test_what_is_trained_on_keeps_its_last_batch_out_if_asked() -> None:
    data = TensorDataset(torch.arange(25), torch.zeros(25))
    train, held = hold_out(DataLoader(data, batch_size=4, drop_last=True), 0.1, seed=1)
    assert [len(inputs) for inputs, _ in train] == [4] * 5 and sum(len(inputs) for inputs, _ in held) == 2


def test_a_held_out_loss_that_is_no_number_is_an_error() -> None:
    held = HeldOutLoss([(torch.randn(4, 3), torch.randn(4, 1))], lambda inputs, outputs, target: outputs.mean() / 0)
    with pytest.raises(StageError, match="loss on held-out training data is NaN or infinite; lower learning_rate"):
        held(nn.Linear(3, 1))

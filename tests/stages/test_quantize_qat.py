"""Training with rounded tensors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import onnx
import pytest
import torch
from integers import FLOAT, error, export, operators
from networks import NETWORKS
from torch import nn
from torch.nn.functional import cross_entropy

from optpipe import StageError
from optpipe.checkpoint import Checkpoint
from optpipe.forms.torch import content_hash
from optpipe.stages.prune.magnitude import Magnitude
from optpipe.stages.quantize import torchao_patterns
from optpipe.stages.quantize.fakequant import calibrate_rounded, freeze, prepare_training, ranges_kept
from optpipe.stages.quantize.qat import Qat
from optpipe.stages.quantize.static import Granularity, Observer, Signedness, Static

U8S8 = {"signedness": Signedness.u8s8}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS["residual"]()


@pytest.fixture
def ctx(model, context):
    """Images of a class's own pattern under noise, and a model that was trained on them."""
    patterns = torch.randn(4, 3, 8, 8)
    batches = []
    for _ in range(10):
        target = torch.randint(4, (32,))
        batches.append((patterns[target] + 2.5 * torch.randn(32, 3, 8, 8), target))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for images, target in batches[:6] * 3:
        optimizer.zero_grad()
        cross_entropy(model(images), target).backward()
        optimizer.step()
    made = context(model.eval())
    held = batches[6:]
    task = dataclasses.replace(
        made.task, train=batches[:6], validation=held, calibration=held[:2], test=held, example_inputs=held[0][0]
    )
    return dataclasses.replace(made, task=task)


def accuracy(model: nn.Module, ctx) -> float:
    return float(ctx.task.evaluate(model, "validation").mean())


@pytest.mark.slow  # torchao takes 20 s to compile the patterns of batch norm
def test_a_trained_model_runs_in_integers_without_batch_norm(model, ctx, tmp_path) -> None:
    static = Static(**U8S8, weights=Granularity.per_tensor).run(copy.deepcopy(model), ctx)
    quantised = Qat(epochs=2, learning_rate=1e-3, **U8S8, weights=Granularity.per_tensor).run(model, ctx)
    found = operators(quantised, ctx.task, tmp_path)
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1 and found["QLinearAdd"] == 1 and not FLOAT & set(found)
    kinds = {node.op_type for node in onnx.load(export(quantised, ctx.task, tmp_path).path).graph.node}
    assert "BatchNormalization" not in kinds
    assert accuracy(quantised, ctx) >= accuracy(static, ctx) - 0.01
    assert ctx.facts["frozen_after"] == 1 and len(ctx.facts["losses"]) == 2


class Shrunk(nn.Module):
    """Two kinds of convolution, with a bias and without, and a square root that is not batch norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.each = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        return self.head(torch.sqrt(self.up(self.each(self.down(image))).mean((2, 3)).abs() + 1))


@pytest.mark.slow  # torchao exports 140 patterns
@pytest.mark.parametrize("weights", Granularity)
def test_patterns_that_are_not_needed_change_nothing(weights, context, monkeypatch) -> None:
    torch.manual_seed(0)
    model = Shrunk().eval()
    ours = Qat(epochs=1, **U8S8, weights=weights).run(copy.deepcopy(model), context(model))
    monkeypatch.setattr(torchao_patterns, "patterns_once", contextlib.nullcontext)
    torchaos = Qat(epochs=1, **U8S8, weights=weights).run(copy.deepcopy(model), context(model))
    assert content_hash(ours) == content_hash(torchaos)


def test_training_that_does_not_help_is_taken_back(model, ctx) -> None:
    model.norms = nn.ModuleList(nn.Identity() for _ in range(3))
    before = copy.deepcopy(model)
    quantised = Qat(epochs=1, learning_rate=0.5, **U8S8).run(model, ctx)
    assert ctx.facts["best_epoch"] == 0
    assert any(note.startswith("no epoch was better than calibration alone") for note in ctx.notes)
    calibrated = Static(observer=Observer.moving_average, **U8S8).run(before, ctx)
    assert error(quantised, calibrated, ctx.task) < 0.05


def statistics(prepared: nn.Module) -> dict[str, torch.Tensor]:
    """What is learned from data without a gradient: ranges, and batch norm's mean and variance."""
    words = ("running_", "min_val", "max_val", "scale", "zero_point")
    return {name: value.clone() for name, value in prepared.state_dict().items() if any(w in name for w in words)}


def test_what_is_frozen_stays(model, ctx) -> None:
    prepared, quantizer = prepare_training(model, Qat(), ctx)
    calibrate_rounded(prepared, quantizer, ctx)
    for frozen in (False, True):
        prepared.train()
        if frozen:
            freeze(prepared)
        before = statistics(prepared)
        for images, _ in ctx.task.train:
            prepared(3 * images)
        changed = {name for name, value in statistics(prepared).items() if not torch.equal(value, before[name])}
        assert not changed if frozen else {name.rpartition(".")[2] for name in changed} >= {"running_mean", "max_val"}


def test_training_that_helps_is_kept(context, tmp_path) -> None:
    torch.manual_seed(0)
    model = NETWORKS["grouped"]().eval()
    made = context(nn.Sequential(NETWORKS["grouped"]()).eval()[0])  # another teacher, to learn from
    ctx = dataclasses.replace(made, task=dataclasses.replace(made.task, train=list(made.task.train) * 4))
    quantised = Qat(epochs=2, learning_rate=3e-3, alpha=1.0, keep=["2"], **U8S8).run(model, ctx)
    assert ctx.facts["best_epoch"] > 0 and ctx.facts["losses"][-1] < ctx.facts["losses"][0]
    found = operators(quantised, ctx.task, tmp_path)
    assert (
        found["QLinearConv"] == 1 and found["QGemm"] == 1 and sum(found[kind] for kind in FLOAT) == 1
    )  # the layer that was kept
    with pytest.raises(StageError, match=r"keep names 'steam', which matches no layer"):
        Qat(keep=["steam"]).run(model, ctx)


def test_a_layer_that_is_used_twice_keeps_one_weight(context, tmp_path) -> None:
    torch.manual_seed(0)
    model = NETWORKS["used twice"]().eval()
    ctx = context(model)
    quantised = Qat(epochs=1, **U8S8).run(model, ctx)
    found = operators(quantised, ctx.task, tmp_path)
    assert found["QLinearConv"] == 4 and not FLOAT & set(found)
    tables = [i for i in onnx.load(export(quantised, ctx.task, tmp_path).path).graph.initializer if len(i.dims) == 4]
    assert len(tables) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"processes": 2}, "processes is 2; quantize/qat trains in one"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"alpha": 1.5}, "alpha is 1.5; it must be between 0 and 1"),
        ({"held_out": 1.0}, "held_out is 1.0; it must be between 0 and 1"),
        ({"freeze_after": -1}, "freeze_after is -1; it must not be negative"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        Qat(**settings)


def test_judging_does_not_move_the_ranges(model, context) -> None:
    ctx = context(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    prepared, quantizer = prepare_training(copy.deepcopy(ctx.baseline), Qat(), ctx)
    calibrate_rounded(prepared, quantizer, ctx)
    before = copy.deepcopy(prepared.state_dict())
    with ranges_kept(prepared):
        prepared(100 * ctx.task.example_inputs)
    assert [name for name, tensor in prepared.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_zeros_that_pruning_left_stay_zero(context) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4))
    ctx = context(model)
    pruned = Magnitude(sparsity=0.8).run(copy.deepcopy(model), ctx)
    quantised = Qat(epochs=1, held_out=0.25).run(pruned, ctx)
    integers = [
        tensor for tensor in quantised.state_dict().values() if tensor.dtype is torch.int8 and tensor.dim() == 2
    ]
    assert sum(int((tensor == 0).sum()) for tensor in integers) >= 0.79 * sum(tensor.numel() for tensor in integers)


def test_a_killed_training_goes_on_from_its_checkpoint(context, tmp_path, monkeypatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4))

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        settings = Qat(epochs=3, held_out=0.25, checkpoint=str(tmp_path))
        return settings.run(copy.deepcopy(model), context(model)).state_dict()

    whole = run()
    write = Checkpoint.write

    def killed(checkpoint, state) -> None:
        write(checkpoint, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoint, "write", killed)
        run()
    assert (tmp_path / "training.ckpt").exists()
    resumed = run()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not (tmp_path / "training.ckpt").exists()

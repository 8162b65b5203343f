from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from optpipe import StageError
from optpipe.metrics import mean_squared_error
from optpipe.stages.distill import Finetune, Logits
from optpipe.task import Task
from optpipe.training import Schedule, fit, hold_out


def distance(student: nn.Module, teacher: nn.Module, task) -> float:
    with torch.no_grad():
        return float((student(task.example_inputs) - teacher(task.example_inputs)).abs().mean())


def test_the_student_comes_closer_to_its_teacher(model, context, task) -> None:
    student = copy.deepcopy(model)
    nn.init.normal_(student.head[3].weight)
    ctx = context(model)
    before = distance(student, model, task)
    student = Logits(epochs=20, alpha=1.0, held_out=0.25).run(student, ctx)
    assert distance(student, model, task) < 0.5 * before
    assert 1 <= ctx.facts["best_epoch"] <= ctx.facts["epochs"] == 20


def test_patience_stops_early_and_the_best_epoch_is_kept(model, context) -> None:
    ctx = context(model)
    Logits(epochs=200, learning_rate=0.3, patience=2, held_out=0.25).run(copy.deepcopy(model), ctx)
    assert ctx.facts["epochs"] <= ctx.facts["best_epoch"] + 2 < 200


def test_the_same_seed_trains_the_same_student(model, context, task) -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(Logits(epochs=2).run(copy.deepcopy(model), context(model))(task.example_inputs))
    assert torch.equal(*outputs)


def test_finetuning_learns_targets_of_any_kind(context) -> None:
    inputs = torch.randn(64, 8)
    batches = [(inputs, inputs[:, :3].sum(1, keepdim=True))]
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), batches * 4)
    regression = Task(**splits, example_inputs=inputs, metric=mean_squared_error(), loss=mse_loss)
    model = nn.Linear(8, 1)
    ctx = dataclasses.replace(context(model), task=regression)
    before = float(regression.evaluate(model, "test").mean())
    Finetune(epochs=50, learning_rate=0.1, held_out=0.25).run(model, ctx)
    assert float(regression.evaluate(model, "test").mean()) < 0.1 * before
    assert ctx.facts["losses"][-1] < ctx.facts["losses"][0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"held_out": 1.0}, "held_out is 1.0; it must be above 0 and below 1"),
        ({"patience": -1}, "patience is -1; it must not be negative"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings, words) -> None:
    for stage in (Logits, Finetune):
        with pytest.raises(ValueError, match=words):
            stage(**settings)


def test_a_student_with_other_outputs_is_refused(model, context) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(StageError, match=r"student gives \[\(16, 3\)\].*teacher \[\(16, 4\)\]"):
        Logits().run(student, context(model))


def test_a_loss_that_explodes_says_what_to_change(model, context) -> None:
    student = copy.deepcopy(model)
    student.head[3].weight.data.mul_(float("inf"))
    with pytest.raises(StageError, match=r"the loss became .* in epoch 1; lower learning_rate"):
        Logits(epochs=1).run(student, context(model))


def test_a_loss_that_is_nought_teaches_nothing() -> None:
    batches = [(torch.randn(8, 4), torch.randn(8, 1))]
    with pytest.raises(StageError, match=r"the loss was 0 in every batch of epoch 1.*Task\(loss="):
        fit(
            nn.Linear(4, 1),
            batches,
            lambda _, outputs, target: cross_entropy(outputs, target),
            Schedule(epochs=2, learning_rate=1e-3),
        )


def test_held_out_samples_are_not_trained_on() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.arange(100), torch.zeros(100)), batch_size=10, shuffle=True)
    train, held = ({int(i) for inputs, _ in part for i in inputs} for part in hold_out(loader, 0.2, seed=1))
    assert len(train) == 80 and len(held) == 20 and not train & held
    batches = [(torch.tensor([i]), None) for i in range(10)]
    train, held = ({int(inputs) for inputs, _ in part} for part in hold_out(batches, 0.2, seed=1))
    assert held == {4, 9} and not train & held

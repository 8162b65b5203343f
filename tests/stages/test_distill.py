from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from optpipe import StageError
from optpipe.held_out import hold_out
from optpipe.imitation import imitation
from optpipe.metrics import mean_squared_error
from optpipe.schedule import Precision
from optpipe.stages.distill import Features, Finetune, Logits
from optpipe.task import Task
from optpipe.training import Schedule, fit


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
    for stage in (Logits, Finetune, Features):
        with pytest.raises(ValueError, match=words):
            stage(**settings)


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        (Logits, {"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        (Features, {"alpha": 2.0}, "alpha is 2.0; it must be between 0 and 1"),
        (Features, {"hint_weight": 0.0}, "hint_weight is 0.0; it must be above 0, or use distill/logits"),
        (Features, {"hints": ["a"], "teacher_hints": ["a", "b"]}, "hints names 1 layers and teacher_hints 2"),
        (Logits, {"student": "make"}, "student is 'make'; it must be the dotted path of a callable"),
        (Finetune, {"student_args": {"width": 8}}, "student_args are given without a student"),
    ],
)
def test_settings_of_one_method_that_are_wrong(stage, settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**settings)


class Heads(nn.Module):
    """A linear layer per output: of features (n, 8), or (n, length, 8)."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, width) for width in widths)

    def forward(self, features):
        found = [head(features) for head in self.heads]
        return found[0] if len(found) == 1 else {"class": found[0], "box": found[1]}


def tokens_last(outputs, target):
    return cross_entropy(outputs.transpose(1, 2), target)


def of_class_and_box(outputs, target):
    return cross_entropy(outputs["class"], target["class"]) + mse_loss(outputs["box"], target["box"])


KINDS = {
    "classes": ((64, 8), (4,), torch.randint(4, (64,)), cross_entropy, "classes"),
    "tokens": ((64, 5, 8), (4,), torch.randint(4, (64, 5)), tokens_last, "classes"),
    "labels": ((64, 8), (4,), torch.randint(2, (64, 4)).float(), binary_cross_entropy_with_logits, "labels"),
    "values": ((64, 8), (2,), torch.randn(64, 2), mse_loss, "values"),
    "several": (
        (64, 8), (4, 2), {"class": torch.randint(4, (64,)), "box": torch.randn(64, 2)}, of_class_and_box,
        "class: classes, box: values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_any_kind_of_outputs_is_imitated(kind, context) -> None:
    torch.manual_seed(0)
    shape, widths, target, loss, told = KINDS[kind]
    inputs = torch.randn(shape)
    batches = [(inputs, target)]
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), batches * 4)
    teacher, student = Heads(*widths), Heads(*widths)
    task = Task(**splits, example_inputs=inputs, metric=mean_squared_error(), loss=loss)
    ctx = dataclasses.replace(context(teacher), task=task)
    judge = imitation(copy.deepcopy(teacher), task, alpha=1.0, temperature=2.0)
    before = float(judge(inputs, student(inputs), target).detach())
    assert float(judge(inputs, teacher(inputs), target).detach()) == pytest.approx(0, abs=1e-6)
    student = Logits(epochs=20, learning_rate=0.05, alpha=1.0, held_out=0.25).run(student, ctx)
    assert float(judge(inputs, student(inputs), target).detach()) < 0.1 * before
    assert ctx.facts["outputs"] == judge.describe() == told


def test_the_loss_is_that_of_the_paper_and_ignored_positions_do_not_count() -> None:
    torch.manual_seed(0)
    student, teacher, target = torch.randn(6, 3, 5), torch.randn(6, 3, 5), torch.randint(3, (6, 5))
    task = Task(train=[], validation=[], calibration=[], test=[], example_inputs=student, metric=mean_squared_error())
    target[:, 3:] = -100  # padding
    found = imitation(nn.Identity(), task, alpha=0.7, temperature=2.0).loss(student, teacher, target)
    p, q = (logits[..., :3].div(2).softmax(1) for logits in (teacher, student))
    kl = (p * (p / q).log()).sum(1).mean()
    assert float(found) == pytest.approx(float(0.7 * 4 * kl + 0.3 * cross_entropy(student, target)), rel=1e-5)


def test_hints_bring_the_layers_of_a_narrower_student_closer(model, context, task) -> None:
    from optpipe.stages.prune.channels import Channels

    student = Channels(ratio=0.5).run(copy.deepcopy(model), context(model))
    names = dict(student.named_modules())
    ctx = context(model)
    trained = Features(epochs=3, hints=["stem", "conv"], teacher_hints=["stem", "norm"], held_out=0.25).run(
        student, ctx
    )
    assert dict(trained.named_modules()).keys() == names.keys()  # neither projections nor hooks are left
    assert not any(module._forward_hooks for module in trained.modules())
    assert trained(task.example_inputs).shape == (16, 4)
    assert ctx.facts["hints"] == ["stem <- stem", "conv <- norm"]

    def unlikeness(weight: float) -> float:
        student, ctx = copy.deepcopy(model), context(model)
        nn.init.normal_(student.conv.weight)
        student = Features(epochs=12, hints=["conv"], hint_weight=weight, held_out=0.25).run(student, ctx)
        with torch.no_grad():
            seen = [network.conv(network.stem(task.example_inputs)).flatten(1) for network in (student, model)]
        return 1 - float(torch.cosine_similarity(*seen).mean())

    assert unlikeness(100.0) < 0.8 * unlikeness(1e-6)


def test_without_names_the_middle_layer_of_both_is_the_hint(model, context) -> None:
    ctx = context(model)
    Features(epochs=1).run(copy.deepcopy(model), ctx)
    assert len(ctx.facts["hints"]) == 1
    with pytest.raises(StageError, match="no layer of the same name; give hints and teacher_hints, for example"):
        Features(epochs=1).run(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), context(model))


@pytest.mark.parametrize(
    ("hints", "words"),
    [
        ({"hints": ["stam"]}, "hints names 'stam', which is no layer of the student.*did you mean 'stem'"),
        (
            {"hints": ["stem"], "teacher_hints": ["cnv"]},
            "teacher_hints names 'cnv', which is no layer of the teacher.*did you mean 'conv'",
        ),
        (
            {"hints": ["stem"], "teacher_hints": ["head"]},
            r"compares 'stem', which gives \(16, 32, 8, 8\).*'head', which gives \(16, 4\)",
        ),
    ],
)
def test_hints_that_cannot_be_compared_are_refused(hints, words, model, context) -> None:
    with pytest.raises(StageError, match=words):
        Features(**hints).run(copy.deepcopy(model), context(model))


def small(width: int = 8, classes: int = 4) -> nn.Module:
    """A student of another architecture."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


@pytest.fixture
def here(monkeypatch) -> str:
    """This module, as a setting names it."""
    import sys

    monkeypatch.setitem(sys.modules, "my_students", sys.modules[__name__])
    return "my_students"


def test_a_student_of_another_architecture_is_named_in_the_settings(here, model, context, task) -> None:
    ctx = context(model)
    student = Logits(student=f"{here}.small", student_args={"width": 6}, epochs=2).run(model, ctx)
    assert student[0].out_channels == 6 and student(task.example_inputs).shape == (16, 4)
    assert any("the student is my_students.small" in note for note in ctx.notes)
    hinted = Features(student=f"{here}.small", hints=["0"], teacher_hints=["conv"], epochs=1)
    with pytest.raises(StageError, match=r"\(16, 8, 6, 6\).*only their width may differ: name layers of the same"):
        hinted.run(model, context(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student": "my_students.smal"}, "student is 'my_students.smal', but 'my_students' has no callable.*'small'"),
        ({"student": "no_such.thing"}, "student is 'no_such.thing', but importing 'no_such' failed"),
        (
            {"student": "my_students.small", "student_args": {"depth": 2}},
            "student 'my_students.small' raised TypeError",
        ),
        ({"student": "builtins.dict"}, "student 'builtins.dict' returned dict; it must return an nn.Module"),
        (
            {"student": "my_students.small", "student_args": {"classes": 3}},
            r"student gives \[\(\d+, 3\)\] and the teacher \[\(\d+, 4\)\]; give a student whose outputs have the",
        ),
    ],
)
def test_a_student_that_cannot_be_had_or_does_not_fit(here, settings, words, model, context) -> None:
    with pytest.raises(StageError, match=words):
        Logits(**settings).run(model, context(model))


def test_a_loss_that_cannot_judge_the_student_is_found_before_training(model, context, task) -> None:
    ctx = dataclasses.replace(context(model), task=dataclasses.replace(task, loss=mse_loss))
    with pytest.warns(UserWarning, match="target size"), pytest.raises(StageError, match=r"cannot judge the student"):
        Finetune().run(copy.deepcopy(model), ctx)


def test_a_killed_stage_goes_on_from_the_folder_that_is_named(model, context, tmp_path, monkeypatch) -> None:
    from optpipe.checkpoint import Checkpoint

    def run(folder: str | None) -> tuple[nn.Module, list[str]]:
        torch.manual_seed(3)
        ctx = context(model)
        return Logits(epochs=4, checkpoint=folder).run(copy.deepcopy(model), ctx), ctx.notes

    whole, _ = run(None)
    write = Checkpoint.write

    def killed(self, state) -> None:
        write(self, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "write", killed)
        run(None)
    resumed, notes = run(str(tmp_path))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert any("went on after epoch 1, from the checkpoint in" in note for note in notes)


def test_fp16_tells_how_its_scale_fared(model, context) -> None:
    ctx = context(model)
    Logits(epochs=2, precision=Precision.fp16_mixed).run(copy.deepcopy(model), ctx)
    assert 0 <= ctx.facts["overflow_rate"] < 1 and ctx.facts["loss_scales"][0] == 65536
    assert any("steps overflowed and were left out; the loss scale went from 65536" in note for note in ctx.notes)


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


def narrow() -> nn.Module:
    """A student for inputs of another kind."""
    return nn.Linear(20, 4)


def test_a_student_that_cannot_take_the_inputs_is_refused(model, context) -> None:
    with pytest.raises(
        StageError, match=r"the student cannot take the task's inputs, \[\(\d+, 3, 8, 8\)\] .*student_args"
    ):
        Finetune(epochs=1, student=f"{__name__}.narrow").run(model, context(model))

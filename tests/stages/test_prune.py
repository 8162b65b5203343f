"""Structured pruning: whole channels and heads, in networks of every kind."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
from networks import NETWORKS, Attention, Text, conv, example
from torch import nn

from optpipe import StageError
from optpipe.stages.prune.channels import Channels, Importance
from optpipe.stages.prune.layers import Scope

# The share of its parameters that a network has at most afterwards, and what is left out and why.
EXPECTED = {
    "grouped": (0.4, ""),
    "depthwise": (0.45, ""),
    "concatenation": (0.3, ""),
    "squeeze-excite": (0.4, ""),
    "shuffle": (0.5, "'mix' stays as it is: .*is invalid for input"),
    "multi-head attention": (0.4, ""),
    "transformer": (0.4, ""),
    "attention by hand": (0.4, ""),
    "attention with constants": (0.6, "'body.value' stays as it is: .*don't multiply up"),
    "attention of fixed width": (
        0.6,
        "'body.value' stays as it is: .*cut into 2 heads instead of 4, because their width",
    ),
    "lstm": (0.9, r"'body.before' stays as it is: its channels run through 'body.recurrent' \(LSTM\)"),
    "gru": (0.9, "'body.before' stays as it is: Torch-Pruning cannot follow its channels"),
    "tied": (0.4, ""),
    "used twice": (0.3, ""),
    "batch norm after linear": (0.5, ""),
    "group norm": (0.3, ""),
    "transposed": (0.4, ""),
    "conv1d": (0.5, ""),
    "text encoder": (0.5, ""),
    "residual": (0.3, ""),
    "mobile": (0.4, ""),
    "channels last": (0.4, ""),
    "u-net": (0.3, ""),
    "vision": (0.3, ""),
    "attention by products": (0.4, ""),
    "attention by flat products": (0.4, ""),
    "linear used twice": (0.5, ""),
    "padded transformer": (0.3, ""),
    "bag of tokens": (0.75, ""),
    "attention by einsum": (0.4, ""),
}


def widths(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def with_task(model: nn.Module, inputs: torch.Tensor, context):
    """A context whose task fits `model`."""
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), [(inputs, torch.tensor([0, 3]))] * 4)
    ctx = context(model)
    return dataclasses.replace(ctx, task=dataclasses.replace(ctx.task, **splits, example_inputs=inputs))


@pytest.mark.parametrize(
    ("ratio", "round_to", "kept"), [(0.5, 8, 16), (0.7, 16, 16), (0.7, 8, 8), (0.5, 1, 16), (0.9, 16, 16)]
)
def test_channels_shrink_to_the_nearest_multiple(model, context, task, ratio: float, round_to: int, kept: int) -> None:
    pruned = Channels(ratio=ratio, round_to=round_to).run(model, context(model))
    assert set(widths(pruned)) == {kept}
    assert pruned(task.example_inputs).shape == (16, 4)  # the classes are all there


@pytest.mark.parametrize("name", EXPECTED)
def test_networks_that_break_naive_pruners(name: str, context) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]().eval(), example(name)
    before, shape, ctx = parameters(model), model(inputs).shape, with_task(model, inputs, context)
    pruned = Channels(round_to=4).run(model, ctx)
    most, reason = EXPECTED[name]
    assert parameters(pruned) <= most * before
    assert pruned(inputs).shape == shape and pruned(inputs).isfinite().all()
    said = "; ".join(note for note in ctx.notes if "stays as it is" in note)
    assert re.search(reason, said) and bool(reason) == bool(said) == ("skipped" in ctx.facts)


@pytest.mark.parametrize("importance", list(Importance))
@pytest.mark.parametrize("name", ["grouped", "tied", "batch norm after linear", "text encoder"])
def test_every_importance_ranks_every_kind_of_layer(name: str, importance: Importance, context) -> None:
    model, inputs = NETWORKS[name]().eval(), example(name)
    before, ctx = parameters(model), with_task(model, inputs, context)
    assert parameters(Channels(importance=importance, batches=2).run(model, ctx)) < 0.6 * before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("importance", list(Importance))
def test_channels_that_do_nothing_go_first(importance: Importance, context, task) -> None:
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.Flatten(), nn.Linear(1024, 4)).eval()
    for weight in (model[0].weight[::2], model[0].bias[::2], model[2].weight[:, ::2]):
        weight.data.zero_()
    expected = model(task.example_inputs)
    pruned = Channels(importance=importance, keep=["2"]).run(model, context(model))
    assert widths(pruned) == [8, 16]
    assert torch.allclose(pruned(task.example_inputs), expected, atol=1e-5)


def test_over_the_whole_model_some_layers_lose_more(context) -> None:
    model = nn.Sequential(
        conv(3, 32), nn.ReLU(), conv(32, 32), nn.ReLU(), conv(32, 32), nn.Flatten(), nn.Linear(2048, 4)
    )
    model[2].weight.data[:24] *= 1e-3
    Channels(ratio=0.4, round_to=1, scope=Scope.model).run(model, context(model))
    assert 0.55 < sum(widths(model)) / 96 < 0.65 and len(set(widths(model))) > 1


def test_rounds_reach_the_same_width_with_training_between_them(model, context) -> None:
    torch.manual_seed(0)
    at_once = Channels().run(copy.deepcopy(model), context(model))
    in_rounds = Channels(rounds=3, learning_rate=0.01).run(copy.deepcopy(model), context(model))
    assert widths(in_rounds) == widths(at_once)
    assert not torch.equal(in_rounds.head[3].bias, at_once.head[3].bias)  # nothing but training changes it


@pytest.mark.parametrize("split", ["heads", "width"])
def test_whole_heads_go(split: str, context) -> None:
    torch.manual_seed(0)
    model, inputs = Text(Attention(split)).eval(), example("text")
    Channels(heads=True, keep=["body.out"]).run(model, with_task(model, inputs, context))
    assert (model.body.heads, model.body.query.out_features, model.body.out.in_features) == (2, 16, 16)
    assert model(inputs).shape == (2, 4)


def test_a_network_that_is_nearly_all_recurrent_names_the_reason(context) -> None:
    model = NETWORKS["bidirectional lstm"]().eval()
    with pytest.raises(StageError, match=r"removes no channel.*'body' stays as it is: its channels run .* \(LSTM\)"):
        Channels().run(model, with_task(model, example("bidirectional lstm"), context))


def test_heads_that_cannot_go_are_named(context) -> None:
    for name, words in (
        ("attention with constants", "'body.value' stays as"),
        ("transformer", "ties its heads to its"),
    ):
        model, inputs = NETWORKS[name]().eval(), example(name)
        ctx = with_task(model, inputs, context)
        Channels(heads=True).run(model, ctx)
        assert any(words in note for note in ctx.notes)
    model = Text(nn.Linear(32, 32))
    with pytest.raises(StageError, match="heads=true, but no linear layer"):
        Channels(heads=True).run(model, with_task(model, inputs, context))


def test_shared_weights_stay_shared_and_frozen_ones_frozen(context) -> None:
    model = NETWORKS["tied"]().eval()
    model.up.weight.requires_grad_(False)
    pruned = Channels().run(model, with_task(model, example("tied"), context))
    assert pruned.head.weight is pruned.embedding.weight and pruned.embedding.weight.shape == (50, 16)
    assert not pruned.up.weight.requires_grad and pruned.down.weight.requires_grad


def test_what_fails_leaves_the_model_as_it_was(context) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (4, 4)), nn.Flatten(), nn.Linear(16, 4)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StageError, match=r"removes no channel of this model.*'0' stays as it is: without some of its"):
        Channels().run(model, with_task(model, torch.randn(2, 8), context))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_ratio_that_would_empty_a_layer_names_it(model, context) -> None:
    with pytest.raises(
        StageError, match=r"ratio=0.99 would leave none of the 32 channels of '\w+(\.\d)?'; lower ratio"
    ):
        Channels(ratio=0.99, round_to=1).run(model, context(model))


def test_kept_layers_and_all_that_depend_on_them_stay(model, context) -> None:
    with pytest.raises(StageError, match="removes no channel"):
        Channels(keep=["stem.*", "conv", "shortcut.*"]).run(model, context(model))
    assert set(widths(model)) == {32}


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(model, context) -> None:
    with pytest.raises(StageError, match=r"keep names 'shotcut\*', which matches no module.*\['shortcut'"):
        Channels(keep=["shotcut*"]).run(model, context(model))


def test_a_model_without_layers_is_an_error(context) -> None:
    with pytest.raises(StageError, match="no convolution or linear layer"):
        Channels().run(nn.Flatten(), context(nn.Flatten()))


def test_weights_that_are_no_numbers_cannot_be_ranked(model, context) -> None:
    model.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(StageError, match=r"'conv.weight' holds NaN or infinity"):
        Channels().run(model, context(model))


def test_two_pruners_of_one_process_share_nothing(model, context) -> None:
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    Channels(ratio=0.7).run(first, context(first))
    assert set(widths(Channels(ratio=0.5).run(second, context(second)))) == {16}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 1.0}, "ratio is 1.0; it must be at least 0 and below 1"),
        ({"round_to": 0}, "round_to is 0; it must be at least 1"),
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"batches": 0}, "batches is 0; it must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        Channels(**settings)

"""Pruning that leaves a layer's width alone: zeros in its weights, or two thin layers in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, conv
from torch import nn

from optpipe import StageError
from optpipe.forms import compressed_bytes, form
from optpipe.stages.distill import Finetune
from optpipe.stages.prune.gradient import Gradient
from optpipe.stages.prune.layers import Scope
from optpipe.stages.prune.low_rank import LowRank
from optpipe.stages.prune.magnitude import Magnitude
from optpipe.stages.prune.nm import NM

LAYERS = ("stem.0", "conv", "shortcut.1", "head.3")


def sparsity(model: nn.Module, *layers: str) -> float:
    weights = [model.get_submodule(layer).weight for layer in layers]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("method", [Magnitude, Gradient])
def test_each_layer_gets_as_sparse_as_asked(method, model, context) -> None:
    ctx = context(model)
    pruned = method(sparsity=0.7).run(model, ctx)
    for layer in LAYERS:
        assert sparsity(pruned, layer) == pytest.approx(0.7, abs=0.01)
    assert ctx.facts["sparsity"] == pytest.approx(sparsity(pruned, *LAYERS))
    assert ctx.facts["layer_sparsity"]["conv"] == sparsity(pruned, "conv")
    assert any("neither shrink a dense file nor speed up" in note for note in ctx.notes)
    assert set(pruned.state_dict()) == set(ctx.baseline.state_dict())  # no masks left over


def test_the_smallest_weights_of_the_whole_model_go(model, context) -> None:
    model.conv.weight.data *= 1e-3
    pruned = Magnitude(sparsity=0.5, scope=Scope.model).run(model, context(model))
    assert sparsity(pruned, *LAYERS) == pytest.approx(0.5, abs=0.001)
    assert sparsity(pruned, "conv") > 0.5 > sparsity(pruned, "head.3")


def test_weights_that_the_loss_does_not_see_go_first(context) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    model[3].weight.data[:, :8] = 0  # nothing reads the first eight outputs of the layer before
    model[1].weight.data[:8] *= 100
    pruned = Gradient(sparsity=0.5, layers=["1"], batches=2).run(model, context(model))
    assert (pruned[1].weight[:8] == 0).all() and (pruned[1].weight[8:] != 0).all()


def test_two_of_four_along_the_inputs(model, context) -> None:
    ctx = context(model)
    pruned = NM().run(model, ctx)
    for layer in ("conv", "shortcut.1", "head.3"):
        groups = pruned.get_submodule(layer).weight.movedim(1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
        assert torch.equal(
            groups.abs().amax(1), ctx.baseline.get_submodule(layer).weight.movedim(1, -1).reshape(-1, 4).abs().amax(1)
        )
    assert sparsity(pruned, "stem.0") == 0 and ctx.facts["skipped"] == ["stem.0"]
    assert any("'stem.0' (3 inputs)" in note for note in ctx.notes)


@pytest.mark.parametrize("name", ["multi-head attention", "lstm", "transposed", "tied"])
def test_weights_of_every_kind_of_layer(name: str, context) -> None:
    model = NETWORKS[name]()
    ctx = context(model)
    pruned = NM(n=1, m=4, keep=["0"] if name == "transposed" else []).run(copy.deepcopy(model), ctx)
    assert ctx.facts["sparsity"] == 0.75
    assert Magnitude().run(model, ctx) is model and ctx.facts["sparsity"] == pytest.approx(0.5, abs=0.01)
    if name == "tied":
        assert pruned.head.weight is pruned.embedding.weight


@pytest.mark.parametrize("stage", [Magnitude(sparsity=0.8), Gradient(sparsity=0.8), NM()])
def test_zeros_outlive_saving_and_training(stage, model, context, tmp_path) -> None:
    ctx = context(model)
    model.shortcut[1].weight.data.zero_()  # by its author's will, to be trained
    stage.keep = ["shortcut.*"]
    form("torch").save(stage.run(model, ctx), tmp_path)
    loaded = form("torch").load(tmp_path)
    before = {layer: loaded.get_submodule(layer).weight == 0 for layer in LAYERS}
    trained = Finetune(epochs=2, held_out=0.25).run(loaded, ctx)
    for layer in ("stem.0", "conv", "head.3"):
        weight = trained.get_submodule(layer).weight
        assert torch.equal(weight == 0, before[layer]) and not torch.equal(
            weight, ctx.baseline.get_submodule(layer).weight
        )
    assert (trained.shortcut[1].weight != 0).any()


def test_zeros_show_in_the_compressed_size_alone(model, context, tmp_path) -> None:
    torch_form, sizes = form("torch"), []
    for stage in (None, Magnitude(sparsity=0.8)):
        torch_form.save(stage.run(model, context(model)) if stage else model, tmp_path)
        sizes.append((torch_form.size_bytes(tmp_path), compressed_bytes(torch_form, tmp_path)))
    (dense, packed), (sparse, packed_sparse) = sizes
    assert dense == sparse and packed_sparse < 0.5 * packed


def test_what_cannot_be_pruned_is_refused(model, context, task) -> None:
    ctx = context(model)
    with pytest.raises(StageError, match=r"layers names 'con', which matches no module.*nearest names are \['conv'"):
        Magnitude(layers=["con"]).run(model, ctx)
    with pytest.raises(
        StageError, match=r"sparsity=0.999 with scope=layer would leave 'head.3' none of its 128 weights"
    ):
        Magnitude(sparsity=0.999).run(model, ctx)
    with pytest.raises(StageError, match=r"multiple of m=5: 'stem.0' has 3, 'conv' has 32"):
        NM(m=5).run(model, ctx)
    with pytest.raises(StageError, match="no convolution, linear, attention or recurrent layer"):
        Magnitude().run(nn.Flatten(), ctx)
    task.train = []
    with pytest.raises(StageError, match="the train split is empty"):
        Gradient().run(model, ctx)
    task.train, task.loss = task.test, lambda outputs, _: (outputs * float("inf")).sum()
    with pytest.raises(StageError, match=r"the gradient of '.*' is NaN or infinite"):
        Gradient().run(model, ctx)


def error(found: nn.Module, model: nn.Module, task) -> float:
    with torch.no_grad():
        a, b = model(task.example_inputs), found(task.example_inputs)
    return float((a - b).norm() / a.norm())


def test_low_rank_replaces_what_gets_smaller(model, context, task) -> None:
    ctx = context(model)
    replaced = LowRank(rank=8).run(copy.deepcopy(model), ctx)
    assert [module.weight.shape[0] for module in replaced.conv] == [8, 32]
    assert ctx.facts["ranks"] == {"stem.0": 8, "conv": 8, "shortcut.1": 8}
    assert "would get larger, and stay as they are: 'head.3' (128 parameters, 144 with rank 4)" in ctx.notes
    assert 0 < ctx.facts["relative_errors"]["conv"] < 1 and error(replaced, model, task) < 1


def test_energy_and_budget_say_how_much_is_kept(model, context, task) -> None:
    u, s, v = torch.linalg.svd(model.conv.weight.data.flatten(1), full_matrices=False)
    s[3:] *= 1e-4
    model.conv.weight.data = (u * s @ v).view_as(model.conv.weight)
    ctx = context(model)
    assert error(LowRank(energy=0.999, layers=["conv"]).run(copy.deepcopy(model), ctx), model, task) < 1e-2
    assert ctx.facts["ranks"] == {"conv": 3}
    half = LowRank(budget=0.5, layers=["conv"]).run(copy.deepcopy(model), ctx)
    assert 0.4 < sum(layer.weight.numel() for layer in half.conv) / model.conv.weight.numel() <= 0.5


def test_a_budget_goes_where_it_explains_most(model, context, task) -> None:
    model.conv.weight.data = torch.einsum("o,ihw->oihw", torch.randn(32), torch.randn(32, 3, 3))  # of rank 1
    ctx = context(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    replaced = LowRank(budget=0.5).run(copy.deepcopy(model), ctx)
    assert ctx.facts["ranks"]["conv"] == 1 and error(replaced, model, task) < 1e-3
    assert sum(parameter.numel() for parameter in replaced.parameters()) < 0.5 * before


def test_a_strided_dilated_convolution_keeps_its_geometry(context, task) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 2, 2, padding_mode="reflect"), conv(24, 24, groups=4), nn.Flatten(), nn.Linear(384, 4)
    ).eval()
    replaced = LowRank(rank=10, layers=["0"]).run(copy.deepcopy(model), context(model))
    assert replaced[0](task.example_inputs).shape == model[0](task.example_inputs).shape


def test_a_layer_that_others_read_is_left_alone(context) -> None:
    tied = NETWORKS["tied"]()
    ctx = context(tied)
    ctx.task.example_inputs = torch.randint(50, (2, 12))
    LowRank(rank=4).run(tied, ctx)
    assert tied.head.weight is tied.embedding.weight and set(ctx.facts["ranks"]) == {"up", "down"}


def test_low_rank_that_saves_nothing_is_an_error(model, context) -> None:
    with pytest.raises(StageError, match=r"no layer of this model gets smaller.*'stem.0' \(864 parameters"):
        LowRank(rank=100).run(model, context(model))
    with pytest.raises(StageError, match=r"budget=0.01 is less than the \d+\.\d% that rank 1"):
        LowRank(budget=0.01).run(model, context(model))


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        (Magnitude, {"sparsity": 1.0}, "sparsity is 1.0; it must be above 0 and below 1"),
        (Gradient, {"batches": 0}, "batches is 0; it must be at least 1"),
        (NM, {"n": 4}, "n is 4 and m is 4; n must be at least 1 and below m"),
        (LowRank, {}, "no measure of what to keep; set exactly one of rank"),
        (LowRank, {"rank": 4, "energy": 0.9}, "low_rank has rank and energy; set exactly one"),
        (LowRank, {"budget": 1.5}, "budget is 1.5; it must be above 0 and below 1"),
        (LowRank, {"rank": 0}, "rank is 0; it must be at least 1"),
    ],
)
def test_settings_that_are_wrong_in_themselves(stage, settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**settings)

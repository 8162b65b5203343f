"""Static int8: what runs in integers, what stays float, and how the ranges are found."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch
from integers import FLOAT, error, export, export_error, operators
from networks import NETWORKS, Text, conv, example
from torch import nn

from optpipe import StageError, lower
from optpipe.forms import form
from optpipe.stages.quantize.static import Granularity, Observer, Signedness, Static, Symmetry
from optpipe.target import InstructionSet

U8S8 = {"signedness": Signedness.u8s8}


def with_inputs(context, model: nn.Module, inputs: torch.Tensor):
    """A context whose task has `inputs` in every split."""
    ctx = context(model)
    batches = [(inputs, torch.zeros(len(inputs)).long())]
    task = dataclasses.replace(
        ctx.task, train=batches, validation=batches, calibration=batches, test=batches, example_inputs=inputs
    )
    return dataclasses.replace(ctx, task=task)


def of_network(context, name: str):
    """A network of that name, and a context with 16 samples for it."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]().eval(), torch.cat([example(name) for _ in range(8)])
    return model, with_inputs(context, model, inputs)


def test_everything_with_weights_runs_in_integers(model, context, task, tmp_path) -> None:
    found = operators(Static(**U8S8).run(model, context(model)), task, tmp_path)
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1 and found["QLinearAdd"] == 1
    assert not {*FLOAT, "BatchNormalization"} & set(found)


@pytest.mark.parametrize("observer", list(Observer))
def test_every_observer_finds_ranges(model, context, task, observer) -> None:
    assert error(Static(observer=observer, **U8S8).run(model, context(model)), model, task) < 0.1


@pytest.mark.parametrize(
    "settings", [{"weights": Granularity.per_tensor}, {"activations": Symmetry.symmetric}], ids=["per_tensor", "symm"]
)
def test_coarser_schemes_run_in_the_same_operators(model, context, task, tmp_path, settings) -> None:
    quantised = Static(**settings, **U8S8).run(model, context(model))
    found = operators(quantised, task, tmp_path)
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1 and not FLOAT & set(found)
    assert error(quantised, model, task) < 0.15


def ranges(quantised: nn.Module) -> list[tuple[float, int]]:
    """Scale and zero point of every quantised activation."""
    calls = [node for node in quantised.graph.nodes if "quantize_per_tensor" in str(node.target)]
    return [(float(node.args[1]), int(node.args[2])) for node in calls if not isinstance(node.args[1], torch.fx.Node)]


def test_symmetric_ranges_have_zero_in_the_middle(model, context) -> None:
    symmetric = Static(activations=Symmetry.symmetric, observer=Observer.minmax, **U8S8).run(model, context(model))
    assert {zero for _, zero in ranges(symmetric)} == {127, 0}  # 0 behind a relu


def test_rare_outliers_widen_the_range_of_some_observers_only(context) -> None:
    model = nn.Sequential(conv(3, 8), nn.Flatten(), nn.Linear(512, 4)).eval()
    images = torch.randn(16, 3, 8, 8)
    images[0, 0, 0, 0] = 100.0
    scale = {}
    for observer in Observer:
        settings = Static(observer=observer, percentile=99.9, **U8S8)
        scale[observer], _ = ranges(settings.run(model, with_inputs(context, model, images)))[0]
    assert scale[Observer.minmax] == scale[Observer.moving_average] > 100 / 256
    assert scale[Observer.percentile] < 0.2 * scale[Observer.minmax]
    assert scale[Observer.mse] <= scale[Observer.minmax] and scale[Observer.histogram] <= scale[Observer.minmax]


def test_relu6_is_fused_like_relu(context, task, tmp_path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(256, 4)
    ).eval()
    found = operators(Static(**U8S8).run(model, context(model)), task, tmp_path)
    assert found["QLinearConv"] == 2 and "Clip" not in found and found["DequantizeLinear"] == 0


def test_padding_by_name_changes_nothing(context, task, tmp_path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding="same"), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4)
    ).eval()
    found = operators(Static(**U8S8).run(model, context(model)), task, tmp_path)
    assert found["QLinearConv"] == 1 and found["QGemm"] == 1


def test_linear_layers_on_sequences_write_float_and_add_their_bias_in_integers(context, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 4)).eval()
    ctx = with_inputs(context, model, torch.randn(8, 12, 32))
    found = operators(Static(**U8S8).run(model, ctx), ctx.task, tmp_path)
    assert found["QGemm"] == 3 and not {"Add", "MatMulIntegerToFloat", "DequantizeLinear"} & set(found)


def test_embeddings_are_stored_in_integers(context, tmp_path) -> None:
    torch.manual_seed(0)
    model = Text(nn.Linear(32, 32)).eval()
    model.embedding = nn.Embedding(2000, 32)
    ctx = with_inputs(context, model, torch.randint(2000, (16, 12)))
    fp32 = export(model, ctx.task, tmp_path).path.stat().st_size
    quantised = Static().run(model, ctx)
    assert export(quantised, ctx.task, tmp_path).path.stat().st_size < 0.35 * fp32
    assert any("1 embedding tables in int8" in note for note in ctx.notes)
    assert error(quantised, model, ctx.task) < 0.05
    kept = Static(keep=["embedding"]).run(model, with_inputs(context, model, ctx.task.example_inputs))
    assert export(kept, ctx.task, tmp_path).path.stat().st_size > 0.9 * fp32


def test_a_residual_stream_in_float_is_not_rounded(context, tmp_path) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down, self.head = nn.LayerNorm(32), *(nn.Linear(32, n) for n in (32, 32, 4))

        def forward(self, x):
            x = self.norm(x)
            return self.head(torch.tanh(x + self.down(self.up(x).relu())))

    ctx = with_inputs(context, Stream(), torch.randn(16, 32))
    found = operators(Static(**U8S8).run(Stream().eval(), ctx), ctx.task, tmp_path)
    assert found["QGemm"] == 3 and found["Add"] == 1 and "QLinearAdd" not in found
    assert found["DequantizeLinear"] == 0  # what a float operator reads never was in integers


@pytest.mark.parametrize(
    ("name", "integer", "number"),
    [
        ("used twice", "QLinearConv", 4),
        ("linear used twice", "QGemm", 4),
        ("attention by flat products", "QLinearMatMul", 0),
    ],
)
def test_networks_that_break_naive_quantisers(name, integer, number, context, tmp_path) -> None:
    model, ctx = of_network(context, name)
    quantised = Static(**U8S8).run(model, ctx)
    found = operators(quantised, ctx.task, tmp_path)
    assert not FLOAT & set(found) and found[integer] >= number
    assert export_error(quantised, ctx.task, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("settings", "target"),
    [({}, {}), ({"weights": Granularity.per_tensor}, {}), ({}, {"instruction_set": InstructionSet.avx2})],
    ids=["per_channel", "per_tensor", "seven_bits"],
)
def test_a_head_may_share_its_table_with_an_embedding(settings, target, context, tmp_path) -> None:
    model, ctx = of_network(context, "tied")
    ctx = dataclasses.replace(ctx, target=dataclasses.replace(ctx.target, **target))
    quantised = Static(**settings, **U8S8).run(model, ctx)
    assert error(quantised, model, ctx.task) < 0.1
    found = operators(quantised, ctx.task, tmp_path)
    assert found["QGemm"] == 3 and found["Gather"] == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lstm", r"'body.recurrent' \(lstm\) stays in float: ONNX Runtime has no recurrent"),
        ("transposed", r"'1' \(conv_transpose2d\) stays in float: ONNX Runtime has no transposed"),
        ("transformer", r"'body.self_attn' \(scaled_dot_product_attention\) stays in float"),
        ("attention by einsum", r"'body' \(einsum\) stays in float: .*write it as a matrix product"),
    ],
)
def test_what_stays_float_is_named_with_its_reason(name: str, words: str, context) -> None:
    import re

    model, ctx = of_network(context, name)
    Static().run(model, ctx)
    assert any(re.match(words, note) for note in ctx.notes)


def test_a_model_that_is_only_recurrent_says_so(context) -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(8, 4, batch_first=True)

        def forward(self, x):
            return self.recurrent(x)[0][:, -1]

    with pytest.raises(StageError, match=r"no convolution.*; 'recurrent' \(gru\) has no int8: ONNX Runtime has no rec"):
        Static().run(Only().eval(), with_inputs(context, Only(), torch.randn(4, 6, 8)))


def test_kept_layers_stay_float(model, context, task, tmp_path) -> None:
    ctx = context(model)
    found = operators(Static(keep=["stem.*", "head.3"], **U8S8).run(model, ctx), task, tmp_path)
    assert found["QLinearConv"] == 2 and sum(found[kind] for kind in FLOAT) == 2
    assert ctx.facts["float_layers"] == ["head.3", "stem.0"]


@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6, nn.Identity])
def test_a_kept_layer_between_integers_is_not_rounded_by_the_runtime(relu, context, task, tmp_path) -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), relu(), conv(8, 8), nn.Flatten(), nn.Linear(512, 4)).eval()
    found = operators(Static(keep=["2"], **U8S8).run(model, context(model)), task, tmp_path)
    assert found["QLinearConv"] == 2 and found["Conv"] + found["FusedConv"] == 1
    assert "LeakyRelu" not in found  # which keeps it out of integers, and is fused into it


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(model, context) -> None:
    with pytest.raises(StageError, match=r"keep names 'shortcut.0', which matches no layer.*\['shortcut.1'"):
        Static(keep=["shortcut.0"]).run(model, context(model))
    with pytest.raises(StageError, match=r"beside those that keep=\['\*'\] leaves in float"):
        Static(keep=["*"]).run(model, context(model))


def test_a_channel_without_weights_keeps_its_bias(context, task) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)).eval()
    model[0].weight.data[3] = 0
    model[0].bias.data[3] = 5.0
    ctx = context(model)
    assert error(Static().run(model, ctx), model, task) < 0.05
    assert any("bias fits in int32" in note for note in ctx.notes)


@pytest.mark.parametrize(
    ("instructions", "name", "bits"),
    [("avx512_vnni", "u8s8", 8), ("avx2", "u8s8", 7), ("neon_dotprod", "s8s8", 8), ("avx_vnni_int8", "u8s8", 8)],
)
def test_types_follow_the_instruction_set(instructions: str, name: str, bits: int) -> None:
    from optpipe.stages.quantize.scheme import scheme
    from optpipe.target import Target

    chosen = scheme(Target(instruction_set=InstructionSet(instructions)), "auto")
    assert (chosen.name, chosen.weight_bits) == (name, bits)
    assert instructions in chosen.reason


def test_a_quantised_module_survives_saving_and_stays_small(model, context, task, tmp_path) -> None:
    quantised = Static().run(model, context(model))
    form("torch").save(quantised, tmp_path)
    loaded = form("torch").load(tmp_path)
    assert torch.equal(loaded(task.example_inputs), quantised(task.example_inputs))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} >= {torch.int8, torch.int32}


class Positions(nn.Module):
    """Learnt rows that are added to floats, as a text's positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(24, 64))
        self.up, self.norm, self.head = nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 4)

    def forward(self, x):
        return self.head((self.norm(self.up(x.reshape(-1, 24, 8))) + self.position).mean(1))


@pytest.mark.parametrize(("keep", "is_float"), [([], False), (["add*"], True)])
def test_learnt_positions_are_int8_unless_they_are_kept(context, task, tmp_path, keep, is_float) -> None:
    model = Positions().eval()
    quantised = Static(keep=keep).run(model, context(model))
    assert error(quantised, model, task) < 0.05
    exported = lower.to_onnx(lower.trace(quantised, task), tmp_path / "model.onnx")
    (table,) = [tensor for tensor in onnx.load(exported.path).graph.initializer if list(tensor.dims) == [24, 64]]
    assert (table.data_type == onnx.TensorProto.FLOAT) is is_float


def test_scales_of_biases_are_not_stored(model, context, task, tmp_path) -> None:
    program = lower.trace(Static().run(model, context(model)), task)
    stored, derived = (
        lower.to_onnx(program, tmp_path / f"{rewrite}.onnx", rewrite=rewrite) for rewrite in (False, True)
    )
    assert derived.path.stat().st_size < stored.path.stat().st_size
    outputs = [form("onnx").as_callable(file)(task.example_inputs) for file in (stored, derived)]
    assert torch.equal(*outputs)


def test_a_model_with_nothing_to_quantise_is_an_error(context) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    with pytest.raises(StageError, match="no convolution, linear layer or matrix product"):
        Static().run(model, context(model))


def test_too_little_calibration_data_is_an_error(model, context, task) -> None:
    with pytest.raises(StageError, match="calibration_batches is 9, but the calibration split holds 4; lower it"):
        Static(calibration_batches=9).run(model, context(model))
    task.calibration = []
    with pytest.raises(StageError, match="the calibration split is empty"):
        Static().run(model, context(model))


def test_no_more_calibration_data_is_read_than_asked_for(model, context) -> None:
    ctx = context(model)
    Static(calibration_batches=2).run(model, ctx)
    assert ctx.facts["calibration_batches"] == 2


def test_constant_activations_are_refused_with_what_to_keep(context, task) -> None:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval()
    model[2].bias.data.fill_(-100.0)  # dead behind the relu
    with pytest.raises(StageError, match=r"constant on all calibration data: '3' \(0\).*keep=\[2, 5\]"):
        Static().run(model, context(model))
    ctx = context(model)
    Static(keep=["2", "5"]).run(model, ctx)
    assert ctx.facts["compute_operators"] == 1


class Root(nn.Module):
    """A product that is no module's: its layer has the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(64, 4)

    def forward(self, image):
        return self.head(nn.functional.linear(image.mean(1), self.weight).flatten(1))


def test_a_product_of_the_model_itself_can_be_kept(context) -> None:
    torch.manual_seed(0)
    model = Root().eval()
    ctx = context(model)
    quantised = Static(keep=["linear"]).run(model, ctx)
    assert ctx.facts["float_layers"] == ["linear"] and ctx.facts["compute_operators"] == 1
    assert torch.equal(quantised.weight, model.weight)  # in float


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_that_are_no_numbers_name_the_layer(value: str, model, context) -> None:
    model.conv.weight.data[0, 0, 0, 0] = float(value)
    with pytest.raises(StageError, match="'conv' gives NaN or infinity on calibration data"):
        Static().run(model, context(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calibration_batches": -1}, "calibration_batches is -1; it must not be negative"),
        ({"percentile": 50}, "percentile is 50; it must be above 50 and at most 100"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        Static(**settings)

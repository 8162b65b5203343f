"""What each layer costs in int8, and int8 only where the model bears it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from integers import FLOAT, error, export, operators
from networks import conv
from torch import Tensor, nn

from optpipe import Metric, StageError
from optpipe.forms import form
from optpipe.stages.quantize.mixed import Mixed
from optpipe.stages.quantize.posttraining import calibrate, copied, prepare
from optpipe.stages.quantize.sensitivity import LayerSensitivity, Sensitivity
from optpipe.stages.quantize.static import Granularity, Observer, Signedness, Static

PER_TENSOR = {"weights": Granularity.per_tensor, "signedness": Signedness.u8s8}


@pytest.fixture
def model() -> nn.Module:
    """Layer "2" has a channel with weights of 100 times the others', which the relu behind it silences."""
    torch.manual_seed(0)
    network = nn.Sequential(
        conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4)
    ).eval()
    network[2].weight.data[0] = -100 * network[2].weight.data[0].abs()
    return network


@pytest.fixture
def ctx(model, context):
    """Uniform images, and as their classes what the model itself says."""
    made = context(model)
    images = [torch.rand(32, 3, 8, 8) - 0.5 for _ in range(2)]
    with torch.no_grad():
        middle = model(torch.cat(images)).mean(0)
        model[-1].bias.sub_(middle)  # so that all classes occur
        batches = [(image, model(image).argmax(1)) for image in images]
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), batches)
    task = dataclasses.replace(made.task, **splits, example_inputs=images[0])
    return dataclasses.replace(made, task=task, baseline=copy.deepcopy(model))


def analysed(model: nn.Module, settings: Static, ctx) -> list[LayerSensitivity]:
    prepared, quantizer = prepare(model, settings, ctx)
    calibrate(prepared, quantizer, ctx)
    return Sensitivity(prepared, quantizer, ctx).analyse(judged=True)


def test_the_layer_with_an_outlier_is_the_worst(model, ctx) -> None:
    found = analysed(model, Static(**PER_TENSOR), ctx)
    convolutions = [entry for entry in found if entry.layer in ("0", "2", "4")]
    worst, second = sorted(convolutions, key=lambda entry: entry.output_sqnr_db)[:2]
    assert worst.layer == "2" and worst.output_sqnr_db < second.output_sqnr_db - 10
    per_channel = {entry.layer: entry for entry in analysed(model, Static(signedness=Signedness.u8s8), ctx)}
    assert per_channel["2"].output_sqnr_db > worst.output_sqnr_db + 20


def test_errors_accumulate_and_noise_is_that_of_uniform_rounding(model, ctx) -> None:
    found = {entry.layer: entry for entry in analysed(model, Static(observer=Observer.minmax), ctx)}
    convolutions = [found[name] for name in ("0", "2", "4")]
    assert found["0"].accumulated_sqnr_db == pytest.approx(found["0"].sqnr_db, abs=0.5)
    assert all(entry.accumulated_sqnr_db <= entry.sqnr_db + 0.5 for entry in convolutions)
    assert found["4"].accumulated_sqnr_db < found["4"].sqnr_db
    assert 0.5 < found["0"].input_noise / found["0"].expected_noise < 2
    assert found["0"].outlier_share == 0


def test_rounded_layers_predict_what_the_quantised_model_does(model, ctx) -> None:
    prepared, quantizer = prepare(model, Static(**PER_TENSOR), ctx)
    calibrate(prepared, quantizer, ctx)
    sensitivity = Sensitivity(copied(prepared), quantizer, ctx)
    assert sensitivity.drop(sensitivity.layers) == 0
    quantised = Static(**PER_TENSOR).run(model, ctx)
    real = ctx.task.predict(quantised, "validation").drop_from(sensitivity.float)
    assert sensitivity.drop([]) == pytest.approx(real, abs=0.05) and real > 0.05


def test_the_report_shows_every_layer(model, ctx) -> None:
    Static(sensitivity=True).run(model, ctx)
    assert [row[0] for row in ctx.tables[0].rows] == ["0", "2", "4", "7"]
    drawn = [name for chart in ctx.tables[0].chart for name in ([chart] if isinstance(chart, str) else chart)]
    assert set(drawn) <= set(ctx.tables[0].columns)


def test_only_the_layer_that_costs_stays_float(model, ctx, tmp_path) -> None:
    quantised = Mixed(**PER_TENSOR, max_drop=0.04).run(model, ctx)
    assert ctx.facts["float_layers"] == ["2"] and ctx.facts["layers_in_float"] == 1
    assert ctx.facts["validation_drop"] <= 0.04
    found = operators(quantised, ctx.task, tmp_path)
    assert found["QLinearConv"] == 2 and found["QGemm"] == 1 and sum(found[kind] for kind in FLOAT) == 1
    run = form("onnx").as_callable(export(quantised, ctx.task, tmp_path))
    assert error(run, quantised, ctx.task) < 0.02  # ONNX Runtime would round that layer's weights by itself
    assert len(set(ctx.notes)) == len(ctx.notes)  # what was only tried is not told
    assert any(note.startswith("1 of 4 layers stay float") for note in ctx.notes)


def test_what_int8_does_not_harm_is_all_in_int8(model, ctx) -> None:
    Mixed(max_drop=0.04).run(model, ctx)
    assert ctx.facts["layers_in_float"] == 0 and "float_layers" not in ctx.facts


class Bag(nn.Module):
    """A text's class from the mean of its rows; the first value of every row is huge, and is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(64, 17)
        self.head = nn.Linear(16, 4)
        self.rows.weight.data[:, 0] = 1000.0

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.rows(words)[..., 1:].mean(1))


def test_a_table_that_costs_stays_float(context, tmp_path) -> None:
    torch.manual_seed(0)
    model = Bag().eval()
    words = torch.randint(64, (128, 8))
    with torch.no_grad():
        model.head.bias.sub_(model(words).mean(0))
        batches = [(words, model(words).argmax(1))]
    made = context(model)
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), batches)
    ctx = dataclasses.replace(made, task=dataclasses.replace(made.task, **splits, example_inputs=words))
    quantised = Mixed(max_drop=0.04).run(model, ctx)
    assert ctx.facts["float_layers"] == ["rows"] and ctx.facts["validation_drop"] <= 0.04
    assert operators(quantised, ctx.task, tmp_path)["QGemm"] == 1
    (table,) = ctx.tables
    assert [row[0] for row in table.rows] == ["rows", "head"]


def test_a_bar_that_cannot_be_held_is_an_error(model, ctx) -> None:
    with torch.no_grad():
        batches = [(images, model(images)) for images, _ in ctx.task.validation]
    closeness = Metric(name="closeness", score=lambda found, wanted: -(found - wanted).abs().sum(1), unit="value")
    exact = dataclasses.replace(ctx.task, validation=batches, metric=closeness)
    with pytest.raises(StageError, match=r"with 3 of 4 layers in float, .* max_drop=0 .*raise max_drop"):
        Mixed(max_drop=0.0).run(model, dataclasses.replace(ctx, task=exact))


def test_a_negative_bar_is_wrong_in_itself() -> None:
    with pytest.raises(ValueError, match=r"max_drop is -0.1; it must not be negative"):
        Mixed(max_drop=-0.1)

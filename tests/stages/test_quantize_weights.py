"""Weights in fewer bits: dynamic, weight-only, half and simulated."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from optpipe import StageError, lower, parity
from optpipe.forms import ExportedFile, form
from optpipe.stages.quantize.dynamic import Dynamic
from optpipe.stages.quantize.half import Compute, Dtype, Half
from optpipe.stages.quantize.simulated import Grouping, Levels, Simulated, logarithmic, uniform
from optpipe.stages.quantize.weight_only import Unpack, WeightOnly
from optpipe.target import InstructionSet
from optpipe.task import Task, top1_accuracy

FLOAT_KINDS = {
    "Reshape",
    "FusedConv",
    "Conv",
    "Gemm",
    "GlobalAveragePool",
    "Flatten",
    "Relu",
    "Add",
    "ReorderInput",
    "ReorderOutput",
}


class Reader(nn.Module):
    """Tokens (n, 12) → logits (n, 4), through an embedding, positions, attention, and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 32)
        self.position = nn.Parameter(torch.randn(12, 32) / 10)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.twice = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x + self.twice(torch.relu(self.twice(x))))
        return self.head(x.mean(1))


@pytest.fixture
def text() -> Task:
    torch.manual_seed(0)
    batches = [(torch.randint(200, (16, 12)), torch.randint(4, (16,))) for _ in range(2)]
    return Task(
        train=batches, validation=batches, calibration=batches, test=batches,
        example_inputs=batches[0][0], metric=top1_accuracy(),
    )  # fmt: skip


@pytest.fixture
def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


def export(module: nn.Module, task: Task, folder: Path) -> tuple[ExportedFile, collections.Counter]:
    """The module after being saved and loaded, as a file, and what ONNX Runtime really runs of it."""
    form("torch").save(module, folder)
    module = form("torch").load(folder)
    file = lower.to_onnx(lower.trace(module, task), folder / "model.onnx")
    parity.check(module, form("onnx").as_callable(file), task, precision=parity.precision(module))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    return file, collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def stored_bytes(file: ExportedFile) -> dict[str, int]:
    """Bytes of the weights of a file by type."""
    found: dict[str, int] = collections.Counter()
    for tensor in onnx.load(file.path).graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype != "int64":  # shapes
            found[str(array.dtype)] += array.nbytes
    return dict(found)


def error(found: Any, model: nn.Module, task: Task) -> float:
    with torch.no_grad():
        expected, given = model(task.example_inputs), found(task.example_inputs)
    return float((expected - given).abs().max() / expected.abs().max())


def test_dynamic_multiplies_in_integers(reader, context, text, tmp_path) -> None:
    original = copy.deepcopy(reader)
    ctx = with_task(context(reader), text)
    quantised = Dynamic().run(reader, ctx)
    file, operators = export(quantised, text, tmp_path)
    integers = sum(operators[kind] for kind in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"))
    assert integers == ctx.facts["int8_layers"] == 5  # projections of attention in one, its output, twice, head
    assert not {"Gemm", "MatMulInteger"} & set(operators)
    assert stored_bytes(file)["int8"] == 200 * 32 + 4 * 32 * 32 + 32 * 32 + 32 * 4
    assert error(quantised, original, text) < 0.05


def test_layers_that_are_kept_stay_float_and_are_named(reader, context, text, tmp_path) -> None:
    ctx = with_task(context(reader), text)
    quantised = Dynamic(keep=["attention*"], embeddings=False).run(reader, ctx)
    state = quantised.state_dict()
    assert state["attention.in_proj_weight"].dtype is torch.float32 and state["twice.weight_int8_columns"] is not None
    assert "3 linear layers" in ctx.notes[-1]
    assert all(
        name in ctx.notes[-1].partition("float: ")[2] for name in ("attention", "embedding", "attention.out_proj")
    )


def test_weights_keep_to_seven_bits_without_a_dot_product(context, task) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    ctx = context(model, instruction_set=InstructionSet.avx2)
    assert Dynamic().run(model, ctx).state_dict()["1.weight_int8_columns"].abs().max() == 63


@pytest.mark.parametrize("stage", [Dynamic(keep=["twise"]), WeightOnly(keep=["twise"]), Simulated(keep=["twise"])])
def test_a_pattern_that_matches_nothing_names_the_nearest(reader, context, text, stage) -> None:
    with pytest.raises(StageError, match=r"keep names 'twise', which matches no layer.*'twice'"):
        stage.run(reader, with_task(context(reader), text))


def test_a_model_without_linear_layers_is_an_error(context) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(StageError, match=r"no linear layer.*left: 0.*quantize=weight_only"):
        Dynamic().run(model, context(model))


@pytest.mark.parametrize("stage", [Dynamic(), WeightOnly(), Half()])
def test_weights_that_are_no_numbers_are_named(context, stage) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    model[1].weight.data[2, 2] = torch.inf
    with pytest.raises(StageError, match=r"'1\.weight' holds NaN or infinity"):
        stage.run(model, context(model))


@pytest.mark.parametrize(("bits", "group_size", "most"), [(8, 0, 0.03), (4, 32, 0.2)])
def test_packed_weights_stay_packed(reader, context, text, tmp_path, bits: int, group_size: int, most: float) -> None:
    original = copy.deepcopy(reader)
    stage = WeightOnly(bits=bits, group_size=group_size, unpack=Unpack.at_call)
    quantised = stage.run(reader, with_task(context(reader), text))
    file, operators = export(quantised, text, tmp_path)
    assert operators["MatMulNBits"] == 4  # the head, of 128 weights, is too small
    assert stored_bytes(file)["uint8"] == 5 * 32 * 32 * bits // 8 + 12 * 32
    assert error(quantised, original, text) < most


def test_weights_unpacked_at_load_run_as_float(model, context, task, tmp_path) -> None:
    original = copy.deepcopy(model)
    quantised = WeightOnly(bits=4, group_size=64, unpack=Unpack.at_load).run(model, context(model))
    file, operators = export(quantised, task, tmp_path)
    assert set(operators) <= FLOAT_KINDS  # nothing is left of the unpacking
    assert stored_bytes(file)["uint8"] == (32 * 64 + 32 * 320 + 32 * 64) // 2  # groups are filled up; not the head
    assert error(quantised, original, task) < 0.2


def test_an_input_that_no_group_divides_is_filled_up(context, task, tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 8)).eval()
    original = copy.deepcopy(model)
    quantised = WeightOnly(bits=4, group_size=32).run(model, context(model))
    _, operators = export(quantised, task, tmp_path)
    assert operators["MatMulNBits"] == 1
    assert error(quantised, original, task) < 0.2


@pytest.mark.parametrize("dtype", list(Dtype))
def test_half_the_file_and_the_same_operators(model, context, task, tmp_path, dtype: Dtype) -> None:
    original = copy.deepcopy(model)
    quantised = Half(dtype=dtype).run(model, context(model))
    file, operators = export(quantised, task, tmp_path)
    assert set(operators) <= FLOAT_KINDS  # no conversion is left
    stored = stored_bytes(file)
    assert stored[dtype.name.replace("fp", "float").replace("bf16", "bfloat16")] > 20 * stored["float32"]
    assert error(quantised, original, task) < (1e-3 if dtype is Dtype.fp16 else 1e-2)


def test_half_on_a_processor_says_what_the_runtime_does(model, context, task, tmp_path) -> None:
    ctx = context(model)
    half = Half(compute=Compute.half).run(copy.deepcopy(model), ctx)
    assert "it has no fp16 kernel for on a processor" in ctx.notes[-1]
    assert half(task.example_inputs).dtype is torch.float32
    with pytest.raises(StageError, match=r"cannot compute this model in bf16 on a processor.*compute=float"):
        Half(dtype=Dtype.bf16, compute=Compute.half).run(model, context(model))


def test_half_on_a_gpu_computes_in_half(reader, context, text) -> None:
    original = copy.deepcopy(reader)
    half = Half().run(reader, with_task(context(reader, device="cuda"), text))
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    assert parity.precision(half) == "half" and half(text.example_inputs).dtype is torch.float32
    assert error(half, original, text) < 0.02


def test_what_fp16_cannot_hold_is_named(context) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    model[1].weight.data[0, 0] = 1e5
    with pytest.raises(StageError, match=r"'1\.weight' holds 100000, more than the 65504 that float16.*bf16"):
        Half().run(model, context(model))


@pytest.mark.parametrize("scheme", list(Levels))
@pytest.mark.parametrize("granularity", list(Grouping))
def test_simulated_weights_take_few_values_and_their_size_is_labelled(model, context, scheme, granularity) -> None:
    ctx = context(model)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    simulated = Simulated(scheme=scheme, bits=3, granularity=granularity).run(model, ctx)
    values = simulated.conv.weight.detach()
    assert len(values[0].flatten()[:32].unique()) <= 7
    assert before / 12 < ctx.facts["simulated_packed_bytes"] < before / 4
    assert "simulated" in ctx.notes[-1] and "the file does not shrink" in ctx.notes[-1]


def test_more_bits_and_smaller_groups_round_less() -> None:
    values = torch.randn(8, 4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(values, 2).sign(), torch.round(values / values.abs().amax(-1, keepdim=True)).sign())
    for scheme in (uniform, logarithmic):
        errors = [float((scheme(values, bits) - values).square().mean()) for bits in (2, 3, 4)]
        assert errors == sorted(errors, reverse=True)
    assert set(logarithmic(values, 8).abs().log2().unique().frac().tolist()) == {0.0}


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        (WeightOnly, {"bits": 3}, "bits is 3; it must be 8 or 4"),
        (WeightOnly, {"group_size": 48}, "group_size is 48"),
        (Simulated, {"bits": 9}, "from 2 to 8"),
        (Simulated, {"group_size": 0}, "at least 1"),
    ],
)
def test_settings_that_are_wrong_in_themselves(stage, settings, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stage(**settings)


def with_task(ctx, task: Task):
    from dataclasses import replace

    return replace(ctx, task=task)


class Masked(nn.Module):
    """A linear layer, a table that is no weight, and a mask that no float16 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("table", torch.randn(64, 64))
        self.register_buffer("mask", torch.full((64, 64), -1e9).triu(1))

    def forward(self, x):
        return torch.softmax(self.linear(x) @ self.table + self.mask.sum(0) * 0, -1)


@pytest.mark.parametrize("stage", [Dynamic(), WeightOnly(bits=4), Half()])
def test_tensors_that_are_no_parameters_stay_as_they_are(stage, context, task) -> None:
    model, inputs = Masked().eval(), torch.randn(16, 64)
    table = model.table.clone()
    task.calibration = task.validation = [(inputs, torch.zeros(16).long())]
    task.example_inputs = inputs
    quantised = stage.run(model, context(model))
    assert any(torch.equal(tensor, table) for tensor in quantised.buffers() if tensor.shape == table.shape)

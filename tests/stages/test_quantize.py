from __future__ import annotations

import collections
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from optpipe import StageError, lower
from optpipe.forms import form
from optpipe.stages.quantize.static import Observer, Signedness, Static
from optpipe.target import InstructionSet


def fused_operators(quantised: nn.Module, task, folder: Path) -> collections.Counter:
    """What ONNX Runtime really runs."""
    exported = lower.to_onnx(lower.trace(quantised, task), folder / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def error(quantised: nn.Module, model: nn.Module, task) -> float:
    with torch.no_grad():
        expected, found = model(task.example_inputs), quantised(task.example_inputs)
    return float((expected - found).abs().max() / expected.abs().max())


@pytest.mark.parametrize("observer", list(Observer))
def test_everything_with_weights_runs_in_integers(model, context, task, tmp_path, observer) -> None:
    quantised = Static(observer=observer, signedness=Signedness.u8s8).run(model, context(model))
    operators = fused_operators(quantised, task, tmp_path)
    assert operators["QLinearConv"] == 3 and operators["QGemm"] == 1 and operators["QLinearAdd"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(operators)
    assert error(quantised, model, task) < 0.1


def test_relu6_is_fused_like_relu(context, task, tmp_path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.Conv2d(16, 16, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(256, 4)
    ).eval()
    operators = fused_operators(Static(signedness=Signedness.u8s8).run(model, context(model)), task, tmp_path)
    assert operators["QLinearConv"] == 2 and "Clip" not in operators and operators["DequantizeLinear"] == 0


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


def test_no_calibration_data_is_an_error(model, context, task) -> None:
    task.calibration = []
    with pytest.raises(StageError, match="the calibration split is empty"):
        Static().run(model, context(model))

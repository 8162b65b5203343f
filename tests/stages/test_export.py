"""Exports: each file is run by its own engine and computes what the model did."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from optpipe import StageError, Task, lower, parity
from optpipe.forms import ExportedFile, form, form_of
from optpipe.plan import Step, chain_problems
from optpipe.registry import info_of
from optpipe.runtimes import as_model, engine_of, make_runner
from optpipe.stages.export import aotinductor, executorch, openvino, tensorrt, torchscript
from optpipe.stages.export import onnx as onnx_stage
from optpipe.stages.export.onnx import Onnx
from optpipe.target import InstructionSet, Target


def same(model: nn.Module, exported: ExportedFile, task: Task, precision: str = "float32") -> parity.Parity:
    run = as_model(make_runner(engine_of(exported.format), exported, threads=1))
    return parity.check(model, run, task, precision=precision)


def test_onnx_carries_what_it_is_told_and_nothing_else(model, context, task) -> None:
    exported = Onnx(metadata={"version": "3"}, input_names=["image"]).run(lower.trace(model, task), context(model))
    proto = onnx.load(exported.path)
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"version": "3"}
    assert [node.name for node in proto.graph.input] == ["image"]
    assert same(model, exported, task).label_flips == 0


def test_weights_that_one_file_cannot_hold_lie_beside_it(model, context, task, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lower, "MAX_FILE_BYTES", 1000)
    exported = Onnx().run(lower.trace(model, task), context(model))
    found = form("onnx")
    assert [path.name for path in found.files(tmp_path)] == ["model.onnx", "model.onnx.data"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found.save(exported, elsewhere)
    assert found.size_bytes(elsewhere) == found.size_bytes(tmp_path) > 1000
    assert same(model, found.load(elsewhere), task).label_flips == 0


def test_an_operator_that_an_opset_lacks_is_named(context, task) -> None:
    class Rounded(nn.Module):
        def forward(self, image):
            return torch.special.bessel_j0(image.flatten(1))[:, :4]

    with pytest.raises(
        StageError,
        match=r"nothing for '[\w.]*bessel_j0', which .*test_export.py:\d+ calls: return torch.special.bessel_j0",
    ):
        Onnx().run(lower.trace(Rounded(), task), context(Rounded()))


def test_an_input_that_nothing_reads_is_named(model, context, task) -> None:
    class Careless(nn.Module):
        def forward(self, image, mask):
            return image.mean((1, 2, 3), keepdim=True).flatten(1).repeat(1, 4)

    images = task.example_inputs
    task.example_inputs = (images, torch.ones(len(images), 3))
    with pytest.raises(StageError, match="never uses the input 'mask'; leave it out"):
        Onnx().run(lower.trace(Careless(), task), context(model))


@pytest.mark.parametrize("half", [False, True])
def test_openvino_from_a_program_and_from_a_file(model, context, task, tmp_path, half: bool) -> None:
    pytest.importorskip("openvino")
    ctx = context(model)
    program = lower.trace(model, task)
    exported = openvino.OpenVino(half=half).run(program, ctx)
    assert form_of(exported) is form("openvino") and ctx.precisions == ["half"] * half
    assert same(model, exported, task, parity.coarsest("float32", *ctx.precisions)).label_flips == 0
    size = form("openvino").size_bytes(tmp_path)
    file = Onnx().run(program, ctx)
    assert same(model, openvino.OpenVino(half=not half).run(file, ctx), task, "half").n
    assert (form("openvino").size_bytes(tmp_path) > size) == half


def test_torchscript_is_frozen(model, context, task, tmp_path) -> None:
    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(model, task.example_inputs)
    frozen = torchscript.TorchScript().run(traced, context(model))
    found = form_of(frozen)
    assert found is form("torchscript") and not list(frozen.parameters())
    heavier = copy.deepcopy(model)
    with torch.no_grad():
        heavier.head[3].weight.mul_(2)
    with pytest.warns(DeprecationWarning):
        other = torch.jit.trace(heavier, task.example_inputs)
    assert found.content_hash(torchscript.TorchScript().run(other, context(model))) != found.content_hash(frozen)
    found.save(frozen, tmp_path)
    again = found.load(tmp_path)
    assert found.content_hash(again) == found.content_hash(frozen)
    run = as_model(make_runner("torch", again, threads=1))
    assert parity.check(model, run, task, precision="float32").label_flips == 0


def test_a_torchscript_module_is_no_torch_module_to_other_stages() -> None:
    steps = [Step("trace", torchscript.TorchScript(), info_of(torchscript.TorchScript))]
    assert "takes a TorchScript module, but the model is a torch module" in chain_problems(steps)[0]


def test_the_precision_of_a_file_is_read_from_its_operators(model, context, task) -> None:
    exported = Onnx().run(lower.trace(model, task), context(model))
    assert parity.precision(exported) == "float32"
    proto = onnx.load(exported.path)
    proto.graph.node.append(onnx.helper.make_node("DynamicQuantizeLinear", ["logits"], ["a", "b", "c"]))
    onnx.save(proto, exported.path)
    assert parity.precision(exported) == "int8"


@pytest.mark.slow
def test_aotinductor_compiles_ahead_of_time(model, context, task) -> None:
    exported = aotinductor.AotInductor().run(lower.trace(model, task), context(model))
    assert same(model, exported, task).label_flips == 0


@pytest.mark.slow
def test_executorch_answers_larger_batches_part_by_part(model, context, task) -> None:
    pytest.importorskip("executorch")
    exported = executorch.ExecuTorch(batch_size=2).run(lower.trace(model, task), context(model))
    assert same(model, exported, task).label_flips == 0


def test_what_an_export_needs_is_said_before_the_run() -> None:
    assert "set target.device=cuda" in tensorrt.TensorRt().problems(Target())[0]
    elsewhere = Target(instruction_set=InstructionSet.neon)
    assert "compiles for the machine that it runs on" in aotinductor.AotInductor().problems(elsewhere)[0]
    assert info_of(tensorrt.TensorRt).extra == "optpipe[tensorrt]"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: onnx_stage.Onnx(opset=12), "opset is 12"),
        (lambda: executorch.ExecuTorch(batch_size=0), "batch_size is 0"),
        (lambda: tensorrt.TensorRt(workspace_mib=0), "workspace_mib is 0"),
    ],
)
def test_settings_that_are_wrong_alone(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_parity_names_the_first_layer_that_differs(model, context, task, tmp_path: Path) -> None:
    from optpipe.divergence import first_divergence

    program = lower.trace(model, task)
    exported = Onnx().run(program, context(model))
    assert first_divergence(program, exported, task.example_inputs, 1e-3) == ""
    proto = onnx.load(exported.path)
    for tensor in proto.graph.initializer:
        if tensor.name == "shortcut.1.weight":
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(2), tensor.name)
            )
    onnx.save(proto, exported.path)
    assert first_divergence(program, exported, task.example_inputs, 1e-3) == "shortcut.1"

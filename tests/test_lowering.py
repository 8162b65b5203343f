"""Out of Python: torch.export, ONNX, and the proof that outputs stay."""

from __future__ import annotations

from pathlib import Path

import my_network
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from optpipe import StageError, Task, lower, parity
from optpipe.forms import form
from optpipe.zoo.digits import DigitsNet


class TwoInputs(nn.Module):
    def forward(self, left, right):
        return left @ right.transpose(1, 2), left.mean(1)


@pytest.fixture
def images() -> Task:
    x, y = torch.randn(6, 1, 32, 32), torch.zeros(6, dtype=torch.long)
    task = my_network.pixels()
    task.validation, task.example_inputs = [(x, y)], x
    return task


def test_a_network_exports_with_a_free_batch_size_and_equal_outputs(images: Task, tmp_path: Path) -> None:
    model = DigitsNet().eval()
    exported = lower.to_onnx(lower.trace(model, images), tmp_path / "model.onnx", input_names=["image"])
    found = parity.check(model, form("onnx").as_callable(exported), images, precision="float32")
    assert found.max_error < 1e-3 and found.label_flips == 0 and found.n == 6
    graph = onnx.load(exported.path).graph
    assert graph.input[0].name == "image" and graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "GlobalAveragePool" in {node.op_type for node in graph.node}  # not ReduceMean


def test_the_same_program_gives_the_same_bytes_without_debug_data(images: Task, tmp_path: Path) -> None:
    program = lower.trace(DigitsNet().eval(), images)
    first, second = (lower.to_onnx(program, tmp_path / name).path.read_bytes() for name in ("a", "b"))
    assert first == second
    assert b".py" not in first and b"stack_trace" not in first


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    task = my_network.pixels()
    inputs = (torch.randn(4, 3, 5), torch.randn(4, 2, 5))
    task.example_inputs, task.validation = inputs, [(inputs, torch.zeros(4))]
    model = TwoInputs()
    exported = lower.to_onnx(lower.trace(model, task), tmp_path / "model.onnx", output_names=["scores", "mean"])
    parity.check(model, form("onnx").as_callable(exported), task, precision="float32")
    assert [value.name for value in onnx.load(exported.path).graph.output] == ["scores", "mean"]


def test_a_model_that_cannot_be_traced_says_why(images: Task) -> None:
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(StageError, match=r"torch\.export cannot capture this model as a graph: \w+"):
        lower.trace(Branches(), images)


def test_a_model_that_fixes_its_batch_size_says_how_to_free_it(images: Task) -> None:
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, 1024)

    with pytest.raises(
        StageError, match=r"batch size becomes a fixed number, at .*x\.reshape\(2.*use tensor\.shape\[0\]"
    ):
        lower.trace(Fixed(), images)


def test_what_one_way_fixes_the_other_leaves_free(images: Task) -> None:
    class Length(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) + torch.zeros(1, 1).expand(len(x), -1)

    program = lower.trace(Length(), images)
    assert program.module()(torch.randn(5, 1, 32, 32)).shape == (5, 1)


def test_parity_refuses_outputs_that_changed(images: Task) -> None:
    model = DigitsNet().eval()
    with pytest.raises(StageError, match=r"the outputs changed by .* more than the 0\.001 that float32 allows"):
        parity.check(model, lambda x: model(x) * 1.01, images, precision="float32")
    with pytest.raises(StageError, match="had shapes"):
        parity.check(model, lambda x: model(x)[:, :5], images, precision="float32")


@pytest.mark.parametrize("wrong", [torch.full((1, 10), torch.nan), torch.full((1, 10), torch.inf)])
def test_parity_refuses_what_is_no_number(images: Task, wrong: torch.Tensor) -> None:
    model = DigitsNet().eval()
    with pytest.raises(StageError, match="the outputs changed by inf"):
        parity.check(model, lambda image: wrong.expand(len(image), 10), images, precision="int8")


def test_a_program_is_the_same_after_saving(images: Task, tmp_path: Path) -> None:
    program = lower.trace(DigitsNet().eval(), images)
    form("program").save(program, tmp_path)
    loaded = form("program").load(tmp_path)
    assert form("program").content_hash(loaded) == form("program").content_hash(program)
    x = images.example_inputs
    np.testing.assert_array_equal(loaded.module()(x).detach(), program.module()(x).detach())

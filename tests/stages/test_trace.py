from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.export import ExportedProgram

from optpipe import StageError
from optpipe.forms import form, form_of
from optpipe.stages.trace import Program, TorchScript


class Branches(nn.Module):
    """Goes another way where the pixels add up to less than nothing."""

    def forward(self, image: Tensor) -> Tensor:
        x = image.mean((2, 3))
        if x.sum() > 0:
            return x * 2
        return x - 1


class Reads(nn.Module):
    """Makes a number of a tensor, with a double that comes and goes."""

    def forward(self, image: Tensor) -> Tensor:
        x = image.mean((2, 3))
        return x * (1.0 + x.abs().max().item())


class Files(nn.Module):
    """Opens a file on its way."""

    def forward(self, image: Tensor) -> Tensor:
        with open(__file__) as file:
            return image.mean((2, 3)) * len(file.readline())


class Randomly(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) * random.random()


class Pretends(nn.Module):
    """Computes something else while it is looked at."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) * (2 if torch.compiler.is_compiling() else 3)


class Overwrites(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        image += 1
        return image.mean((2, 3))


class Sequence(nn.Module):
    """Reads its input row by row; `fixed` writes the number of rows into the code."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.fixed, self.layer = fixed, nn.Linear(24, 4)

    def forward(self, image: Tensor) -> Tensor:
        rows = image.transpose(1, 2).flatten(2)
        if self.fixed:
            rows = rows.view(-1, 8, 24)
        return self.layer(rows).cumsum(1)


@dataclass
class Found:
    scores: Tensor
    extra: dict[str, Any]


class Structured(nn.Module):
    """Returns tensors among what a graph cannot hold."""

    def __init__(self, mixed: bool = True) -> None:
        super().__init__()
        self.layer, self.mixed = nn.Linear(3, 4), mixed

    def forward(self, image: Tensor) -> Any:
        x = image.mean((2, 3))
        scores = self.layer(x)
        return Found(scores, {"mean": x, "names": ["a", 1]}) if self.mixed else {"scores": scores, "mean": x}


def line_of(kind: type, text: str) -> str:
    """ "file:line, `text`" of the first line of this file in `kind` that holds `text`."""
    with open(__file__) as file:
        lines = file.read().splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"class {kind.__name__}")))
    number, found = next((n, line) for n, line in enumerate(lines[start:], start + 1) if text in line)
    return f"test_trace.py:{number}, `{found.strip()}`"


def test_a_network_is_captured_and_says_how(model, context) -> None:
    ctx = context(model)
    program = Program().run(model, ctx)
    assert isinstance(program, ExportedProgram)
    (attempt,) = ctx.attempts
    assert attempt.method == "torch.export, strict" and attempt.ok and attempt.seconds > 0
    assert any("batch size free from 1 to" in note for note in ctx.notes)
    assert ctx.facts["kinds_of_inputs_compared"] >= 8


def test_the_second_way_is_tried_and_the_first_says_why_it_failed(context) -> None:
    ctx = context(Files())
    assert isinstance(Program().run(Files(), ctx), ExportedProgram)
    first, second = ctx.attempts
    assert not first.ok and line_of(Files, "open(") in first.reason and "move it out of forward" in first.reason
    assert second.method == "torch.export, not strict" and second.ok


def test_a_branch_on_values_names_its_line_and_the_remedy(context) -> None:
    ctx = context(Branches())
    with pytest.raises(StageError, match="cannot be captured") as caught:
        Program().run(Branches(), ctx)
    said = str(caught.value)
    assert line_of(Branches, "if x.sum()") in said and "torch.where" in said and "torch.cond" in said
    assert said.count("a branch depends on the values of a tensor") == 1  # one line for ways that fail alike
    assert [attempt.ok for attempt in ctx.attempts] == [False, False]


def test_a_capture_that_computes_something_else_is_refused(context) -> None:
    with pytest.raises(StageError, match=r"baked in a branch: on a batch of 1 outputs differ by 0\.33 of their"):
        Program().run(Pretends(), context(Pretends()))


def test_numbers_that_python_draws_are_refused(context) -> None:
    with pytest.raises(StageError, match="other outputs each time") as caught:
        Program().run(Randomly(), context(Randomly()))
    assert line_of(Randomly, "random.random") in str(caught.value)


def test_a_model_that_writes_into_its_input_is_refused(context, task) -> None:
    before = task.example_inputs.clone()
    with pytest.raises(StageError, match=r"writes into its input 'image'.*write x = x \+ 1") as caught:
        Program().run(Overwrites(), context(Overwrites()))
    assert line_of(Overwrites, "image += 1") in str(caught.value)
    torch.testing.assert_close(task.example_inputs, before)


def test_keep_eager_goes_on_without_a_graph_and_says_so(context) -> None:
    stage, ctx = Program(keep_eager=True), context(Branches())
    assert isinstance(stage.run(Branches(), ctx), Branches)
    assert stage.gives() == ("program", "torch") and Program().gives() == ("program",)
    assert any(note.startswith("NOT CAPTURED") and "if x.sum() > 0" in note for note in ctx.notes)


def test_other_dimensions_stay_free_where_they_are_named(context, task) -> None:
    ctx, model = context(Sequence()), Sequence().eval()
    program = Program(dynamic={"image": [2]}, max_size=100).run(model, ctx)
    images = torch.randn(5, 3, 20, 8)
    torch.testing.assert_close(program.module()(images), model(images))
    assert "dimension 2 of 'image' free from 2 to 100" in ctx.notes


def test_a_dimension_that_the_model_fixes_is_named_with_its_line(context) -> None:
    with pytest.raises(StageError, match="dimension 2 of 'image' cannot stay free: the model fixes it at 8") as caught:
        Program(dynamic={"image": [2]}).run(Sequence(fixed=True), context(Sequence()))
    assert line_of(Sequence, "rows.view(") in str(caught.value)


def test_a_dimension_is_tried_at_another_size(context) -> None:
    class Rows(nn.Module):
        """Its layer sees the rows in patches of four, two of them."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.mix = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 4)

        def forward(self, image: Tensor) -> Tensor:
            return self.mix(self.patches(image).flatten(2))

    with pytest.raises(StageError, match=r"does not run on samples with dimension 2 of 'image'.* halved") as caught:
        Program(dynamic={"image": [2]}).run(Rows(), context(Rows()))
    assert "`return self.mix(" in str(caught.value)


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ({"imag": [2]}, "dynamic names the input 'imag'; did you mean 'image'?; this model takes image"),
        ({"image": [4]}, "dimension 4 of 'image', whose shape is (2, 3, 8, 8)"),
    ],
)
def test_dynamic_must_name_what_is_there(dynamic, said, context) -> None:
    with pytest.raises(StageError, match=re.escape(said)):
        Program(dynamic=dynamic).run(Sequence(), context(Sequence()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dynamic": {"image": [0]}}, "dimension 0 is the batch"),
        ({"min_size": 9, "max_size": 8}, "min_size is 9 and max_size 8"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        Program(**settings)


def test_dynamic_is_a_setting_of_the_command_line() -> None:
    config = OmegaConf.merge(OmegaConf.structured(Program), OmegaConf.from_dotlist(["dynamic.tokens=[1,2]"]))
    assert OmegaConf.to_object(config) == Program(dynamic={"tokens": [1, 2]})


def test_a_graph_gives_the_tensors_of_what_a_model_returns(context, task) -> None:
    model = Structured()
    program = Program().run(model, context(model))
    found = program.module()(task.example_inputs)
    assert list(found) == ["scores", "extra.mean"] and type(model) is Structured
    torch.testing.assert_close(found["scores"], model(task.example_inputs).scores)


def test_a_graph_gives_only_the_outputs_that_the_task_names(context, task) -> None:
    task.outputs = ["mean"]
    for mixed in (True, False):
        program = Program().run(Structured(mixed), context(Structured(mixed)))
        torch.testing.assert_close(program.module()(task.example_inputs), task.example_inputs.mean((2, 3)))
        assert "aten.linear" not in program.graph_module.code  # what led to the others is not computed


def test_torchscript_traces_what_has_no_branch(model, context, task, tmp_path) -> None:
    ctx = context(model)
    traced = TorchScript().run(model, ctx)
    assert form_of(traced) is form("torchscript") and [attempt.method for attempt in ctx.attempts] == [
        "torch.jit.trace"
    ]
    form("torchscript").save(traced, tmp_path)
    loaded = form("torchscript").load(tmp_path)
    torch.testing.assert_close(loaded(task.example_inputs), model(task.example_inputs), rtol=1e-5, atol=1e-5)
    assert form("torchscript").content_hash(loaded) == form("torchscript").content_hash(traced)


def test_torchscript_compiles_a_branch_that_a_trace_would_bake_in(context, task) -> None:
    ctx, model = context(Branches()), Branches()
    scripted = TorchScript().run(model, ctx)
    first, second = ctx.attempts
    assert not first.ok and "bake in a branch" in first.reason and line_of(Branches, "if x.sum()") in first.reason
    assert second.method == "torch.jit.script" and second.ok
    for inputs in (task.example_inputs, -task.example_inputs):
        torch.testing.assert_close(scripted(inputs), model(inputs))


def test_a_number_baked_into_a_trace_is_found_and_named(context) -> None:
    ctx = context(Reads())
    TorchScript().run(Reads(), ctx)
    first = ctx.attempts[0]
    assert "would bake in the number that item makes of the values of a tensor" in first.reason
    assert line_of(Reads, ".item()") in first.reason


def test_a_dict_is_traced_without_strictness_where_scripting_fails(context, task) -> None:
    ctx, model = context(Structured()), Structured()
    traced = TorchScript().run(model, ctx)
    assert [attempt.ok for attempt in ctx.attempts] == [False, False, True]
    assert ctx.attempts[-1].method == "torch.jit.trace, strict=False"
    torch.testing.assert_close(traced(task.example_inputs)["scores"], model(task.example_inputs).scores)


def test_a_model_that_does_not_run_says_where(context, task) -> None:
    class Narrow(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image @ torch.zeros(5, 5)

    with pytest.raises(
        StageError, match=r"does not run on two of its example inputs: RuntimeError.*test_trace.py:\d+, `return image @"
    ):
        Program().run(Narrow(), context(Narrow()))
    with pytest.raises(StageError, match="returns no tensor but int"):
        Program().run(Counts(), context(Counts()))


class Counts(nn.Module):
    def forward(self, image: Tensor) -> int:
        return 3


def test_a_shape_that_the_samples_hide_is_found(context, task) -> None:
    """The example runs with two samples; the graph must take others."""
    ctx = context(Sequence())
    ctx = replace(ctx, task=replace(task, example_inputs=task.example_inputs[:2]))
    program = Program().run(Sequence(), ctx)
    assert program.module()(task.example_inputs).shape == (16, 8, 4)

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from optpipe import StageError, Task, lower
from optpipe.forms import ExportedFile, form
from optpipe.stages.simplify import Graph
from optpipe.stages.simplify.graph import Offline
from optpipe.target import Target


@pytest.fixture
def untidy(task: Task, tmp_path: Path) -> ExportedFile:
    """What an exporter might leave: an identity, a constant that follows from others, a sum nobody reads."""

    class Untidy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, image):
            return self.head(self.conv(image).relu().mean((2, 3)))

    path = tmp_path / "untidy.onnx"
    exported = lower.to_onnx(lower.trace(Untidy().eval(), task), path, output_names=["scores"])
    proto = onnx.load(path)
    last = proto.graph.node[-1]
    last.output[0] = "almost"
    proto.graph.node.append(onnx.helper.make_node("Identity", ["almost"], ["scores"]))
    for name in ("one", "two"):
        value = onnx.numpy_helper.from_array(torch.ones(4).numpy(), name)
        proto.graph.initializer.append(value)
    proto.graph.node.append(onnx.helper.make_node("Add", ["one", "two"], ["nobody"]))
    onnx.save(proto, path)
    return exported


@pytest.mark.parametrize("offline", [Offline.none, Offline.basic])
def test_a_graph_becomes_smaller_and_answers_the_same(untidy, context, task, tmp_path, offline) -> None:
    before = untidy.path.stat().st_size
    ctx = context(nn.Identity())
    found = Graph(offline=offline).run(untidy, ctx)
    assert found.path.stat().st_size < before and ctx.facts["nodes"] < ctx.facts["nodes_before"]
    graph = onnx.load(found.path).graph
    assert "Identity" not in {node.op_type for node in graph.node}
    assert [value.name for value in graph.output] == ["scores"]
    x = task.example_inputs
    torch.testing.assert_close(form("onnx").as_callable(found)(x), form("onnx").as_callable(untidy)(x))


def test_equal_graphs_give_equal_bytes_without_debug_data(untidy, context) -> None:
    first = Graph(offline=Offline.basic).run(untidy, context(nn.Identity())).path.read_bytes()
    assert Graph(offline=Offline.basic).run(untidy, context(nn.Identity())).path.read_bytes() == first
    graph = onnx.load_from_string(first)
    assert not graph.graph.value_info and not any(node.doc_string or node.metadata_props for node in graph.graph.node)


def test_a_graph_that_would_not_shrink_stays_as_it_was(untidy, context) -> None:
    tidy = Graph().run(untidy, context(nn.Identity()))
    before = tidy.path.read_bytes()
    ctx = context(nn.Identity())
    assert Graph().run(tidy, ctx).path.read_bytes() == before
    assert any("stays as it was" in note for note in ctx.notes)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="nothing would be done"):
        Graph(slim=False)
    extended = Graph(offline=Offline.extended)
    assert not extended.problems(Target())
    assert extended.problems(Target(runtime="openvino")) == [
        "offline=extended writes operators that openvino does not have; use offline=basic"
    ]


def test_an_input_that_nothing_reads_is_not_dropped_in_silence(untidy, context) -> None:
    proto = onnx.load(untidy.path)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("spare", onnx.TensorProto.FLOAT, ["batch", 2]))
    onnx.save(proto, untidy.path)
    with pytest.raises(StageError, match="drops or changes the input spare"):
        Graph().run(untidy, context(nn.Identity()))

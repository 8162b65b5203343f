"""Int8 placed for other engines than ONNX Runtime: what they execute is asked of the engines themselves."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from integers import error, export
from networks import NETWORKS, example
from torch import Tensor, nn

from optpipe.errors import StageError
from optpipe.forms import form
from optpipe.lower import trace
from optpipe.runtimes import as_model, make_runner, runtime
from optpipe.stages.quantize.engines import Placement
from optpipe.stages.quantize.mixed import Mixed
from optpipe.stages.quantize.qat import Qat
from optpipe.stages.quantize.static import Granularity, Signedness, Static
from optpipe.target import InstructionSet, Target


class Up(nn.Module):
    """Transposed convolutions, with groups and without."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=4)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.grouped(torch.relu(self.up(torch.relu(self.down(image))))))).mean((2, 3))


def in_openvino(path: Path) -> Counter:
    """Layers with weights that OpenVINO runs, by type and precision."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    told = [layer.get_rt_info() for layer in compiled.get_runtime_model().get_ordered_ops()]
    found = Counter(f"{info['layerType'].astype(str)} {info['runtimePrecision'].astype(str)}" for info in told)
    return Counter({kind: n for kind, n in found.items() if re.match("Convolution|Deconvolution|FullyConnected", kind)})


def test_openvino_runs_everything_in_integers(model, context, task, tmp_path) -> None:
    quantised = Static(placement=Placement.openvino).run(model, context(model))
    exported = export(quantised, task, tmp_path)
    assert in_openvino(exported.path) == {"Convolution u8": 3, "FullyConnected u8": 1}
    run = as_model(make_runner("openvino", exported))
    assert error(run, quantised, task) < 0.02


def test_openvino_has_transposed_convolutions_in_integers(context, task, tmp_path) -> None:
    torch.manual_seed(0)
    model = Up().eval()
    ctx = context(model, runtime="openvino")
    quantised = Static().run(model, ctx)
    exported = export(quantised, task, tmp_path)
    assert [note for note in ctx.notes if "stays in float" in note] == [
        "'grouped' (conv_transpose2d) stays in float: OpenVINO has transposed convolutions in int8 only without groups"
    ]
    assert in_openvino(exported.path) == {"Convolution u8": 2, "Deconvolution u8": 1, "Deconvolution f32": 1}
    assert error(as_model(make_runner("openvino", exported)), quantised, task) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("method", [Static, Qat])
def test_inductor_multiplies_in_integers(method, model, context, task, tmp_path) -> None:
    """torch.compile of the saved program, with constants frozen, as docs/quantize.md says."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    ctx = context(model, runtime="torch")
    quantised = method(placement=Placement.inductor, keep=["conv"]).run(model, ctx)
    form("program").save(trace(quantised, task), tmp_path)
    program = form("program").load(tmp_path).module(check_guards=False)
    with torch.no_grad(), config.patch(freezing=True):
        outputs, code = run_and_get_code(torch.compile(program), task.example_inputs)
    called = Counter(re.findall(r"torch\.ops\.\w+\.(\w+)\.\w+\(|extern_kernels\.(convolution)\(", "".join(code)))
    integers = sum(n for (name, _), n in called.items() if name.startswith(("qconv", "qlinear")))
    assert integers == 3, called  # all but the layer that was kept
    torch.testing.assert_close(outputs, program(task.example_inputs), atol=0.02, rtol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # ExecuTorch's own
def test_xnnpack_takes_the_whole_network(model, context, task, tmp_path) -> None:
    pytest.importorskip("executorch")
    with warnings.catch_warnings(action="ignore"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

    ctx = context(model, runtime="torch")
    quantised = Static(placement=Placement.xnnpack).run(model, ctx)
    assert "s8s8: chosen for XNNPACK" in " ".join(ctx.notes)
    program = torch.export.export(quantised, (task.example_inputs,))  # ExecuTorch plans memory for one batch size
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    calls = [str(node.target) for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    assert not any("convolution" in call or "linear" in call or "quantize" in call for call in calls), calls
    (tmp_path / "model.pte").write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    assert method is not None
    assert error(lambda image: method.execute([image])[0], quantised, task) < 0.02


def test_what_an_engine_lacks_is_told_with_what_there_is(monkeypatch) -> None:
    target = Target()
    assert Static().problems(target) == [] == Static(placement=Placement.inductor).problems(target)
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "executorch" else real(name))
    assert re.search(
        r"needs ExecuTorch.*pip install .*\[executorch\]", Static(placement=Placement.xnnpack).problems(target)[0]
    )
    (found,) = Static(placement=Placement.inductor, weights=Granularity.per_tensor).problems(target)
    assert found.endswith("a scale per channel only, but weights is per_tensor; set it to per_channel")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    (found,) = Qat(placement=Placement.inductor).problems(target)
    assert "oneDNN, which this build of PyTorch lacks; what this machine has is placement=onnxruntime" in found


def test_settings_and_engine_must_agree() -> None:
    stage = Static(placement=Placement.xnnpack, signedness=Signedness.u8s8)
    assert any("signed activations only, but signedness is u8s8" in found for found in stage.problems(Target()))
    stage, x86 = Static(placement=Placement.inductor, signedness=Signedness.s8s8), InstructionSet.avx512_vnni
    assert any("unsigned activations only on x86" in found for found in stage.problems(Target(instruction_set=x86)))
    assert not stage.problems(Target(instruction_set=InstructionSet.neon_dotprod))


@pytest.mark.parametrize("instructions", [InstructionSet.neon, InstructionSet.avx2])
def test_inductor_takes_the_quantiser_of_its_processor(instructions, model, context) -> None:
    ctx = context(model, instruction_set=instructions)
    quantised = Static(placement=Placement.inductor).run(model, ctx)
    kinds = {str(node.target) for node in quantised.graph.nodes}
    assert any("dequantize_per_channel" in kind for kind in kinds)
    expected = {
        InstructionSet.neon: "s8s8: chosen for neon",
        InstructionSet.avx2: "u8s8: chosen for avx2, weights in 7",
    }
    assert expected[instructions] in " ".join(ctx.notes)
    assert any(note.startswith("placed for inductor; onnxruntime, which the target names") for note in ctx.notes)


def test_sensitivity_speaks_of_the_engines_own_placement(model, context) -> None:
    ctx = context(model, runtime="torch")
    Mixed(placement=Placement.inductor, max_drop=1.0).run(model, ctx)
    (table,) = ctx.tables
    assert {"stem.0", "conv", "shortcut.1", "head.3"} <= {row[0] for row in table.rows}


@pytest.mark.parametrize("behind", [nn.Flatten(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(8)])
def test_a_layer_that_is_kept_may_have_anything_behind_it(behind, context) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), behind, nn.Flatten(), nn.LazyLinear(4)).eval()
    model(torch.randn(2, 3, 8, 8))
    ctx = context(model)
    Static(placement=Placement.inductor, keep=["0"]).run(model, ctx)
    assert ctx.facts["float_layers"] == ["0"] and ctx.facts["compute_operators"] == 1


class Reused(nn.Module):
    """A block with one relu for two convolutions, as ResNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(image)))).mean((2, 3))


def test_a_module_may_be_used_twice(context) -> None:
    ctx = context(Reused())
    Static(placement=Placement.inductor).run(Reused().eval(), ctx)
    assert ctx.facts["compute_operators"] == 2


def test_a_quantiser_that_fails_is_an_error_with_a_way_out(context) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(
        StageError, match=r"torchao's quantiser for Inductor cannot place this model .*use quantize\.pl"
    ):
        Static(placement=Placement.inductor).run(model, context(model))


def test_several_threads_may_call_openvino(model, task, tmp_path) -> None:
    exported = export(model, task, tmp_path)
    run = runtime("openvino").runner(exported, threads=1)
    image = task.example_inputs.numpy()
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda _: run(image)[0], range(64)))
    assert all((output == outputs[0]).all() for output in outputs)


def test_what_an_engine_cannot_quantise_is_told(context, task) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 62, 4)).eval()
    ctx = context(model)
    Static(placement=Placement.inductor).run(model, ctx)
    said = r"'1' \(conv1d\) stays in float: torchao's quantiser for Inductor passes over it"
    assert any(re.search(said, note) for note in ctx.notes)
    alone = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 64), nn.Flatten()).eval()
    with pytest.raises(
        StageError, match=r"'1' \(conv1d\) has no int8: torchao's quantiser for Inductor passes over it"
    ):
        Static(placement=Placement.inductor).run(alone, context(alone))


@pytest.mark.slow
@pytest.mark.parametrize("placement", [Placement.openvino, Placement.inductor, Placement.xnnpack])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_placed_or_refused_with_a_reason(name, placement, context, task) -> None:
    if placement is Placement.xnnpack:
        pytest.importorskip("executorch")
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]().eval(), example(name)
    batches = [(inputs, torch.zeros(len(inputs), dtype=torch.long))]
    ctx = context(model)
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), batches)
    ctx = dataclasses.replace(ctx, task=dataclasses.replace(task, **splits, example_inputs=inputs))
    try:
        quantised = Static(placement=placement).run(copy.deepcopy(model), ctx)
    except StageError as refused:
        expected = (
            r"quantiser for (Inductor|XNNPACK) (cannot place|passes over)|constant on all calibration data.*keep="
        )
        assert re.search(expected, str(refused))
    else:
        assert error(quantised, model, ctx.task) < 0.2

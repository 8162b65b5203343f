"""Why a model is not faster: causes read from the graph that ONNX Runtime executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from optpipe.artifact import Artifact
from optpipe.measure import explain
from optpipe.measure.inspect import Inspection, Node, inspect
from optpipe.measure.latency import Bench
from optpipe.measure.measurer import Measurer
from optpipe.measure.nursery import MeasureError
from optpipe.measure.settings import Measure
from optpipe.report.schema import Finding, Measurement, NotMeasured
from optpipe.target import Target
from optpipe.task import Task, top1_accuracy

VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Two batches of noise."""

    def __init__(self, shape: Sequence[int]) -> None:
        random = np.random.default_rng(0)
        self._batches = iter([{"x": random.normal(size=shape).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def convolutions(path: Path, *, channels: int = 16, size: int = 24, between: Sequence[str] = ("Relu",)) -> Path:
    """Three convolutions with `between` behind each, and the batch beside them."""
    random, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for i in range(3):
        values = random.normal(size=(channels, channels, 3, 3)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(values, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv_{i}", pads=[1, 1, 1, 1]))
        last = f"c{i}"
        for kind in between:
            nodes.append(helper.make_node(kind, [last], [f"{last}_{kind}"]))
            last = f"{last}_{kind}"
    shape = [1, channels, size, size]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", last)]
    graph = helper.make_graph(nodes, "convolutions", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    np.savez(path.with_suffix(".npz"), **{"0": np.ones(shape, np.float32)})
    return path


def in_int8(path: Path, activations: QuantType = QuantType.QUInt8) -> Path:
    """The file at `path`, quantised by onnxruntime's own quantiser."""
    values = np.load(path.with_suffix(".npz"))["0"]
    quantised = path.with_name(f"{path.stem}_int8.onnx")
    np.savez(quantised.with_suffix(".npz"), **{"0": values})
    quantize_static(
        path, quantised, Batches(values.shape), quant_format=QuantFormat.QOperator, per_channel=True,
        activation_type=activations, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return quantised


def look(path: Path) -> Inspection:
    return inspect(path, path.with_suffix(".npz"), threads=1)


def causes(findings: Sequence[Finding]) -> list[str]:
    return [finding.cause for finding in findings]


def test_the_optimised_graph_is_told_with_times_and_shapes(tmp_path: Path) -> None:
    seen = look(convolutions(tmp_path / "model.onnx"))
    kinds = [node.kind for node in seen.nodes]
    assert kinds.count("Conv") == 3 and "Relu" not in kinds  # fused
    assert seen.output(seen.nodes[-1]) == replace(seen.tensors["x"], is_constant=False)
    assert seen.p50_ms / 2 < seen.total_ms < seen.p50_ms * 2
    assert seen.share(seen.nodes) + seen.call_ms / seen.total_ms == pytest.approx(1)


def test_a_file_that_cannot_be_executed_is_a_clear_error(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "model.onnx")
    np.savez(path.with_suffix(".npz"), **{"0": np.ones((1, 3), np.float32)})
    with pytest.raises(MeasureError, match=r"looked into the model in onnxruntime died.*last words.*rank"):
        look(path)


def test_a_call_that_costs_more_than_its_kernels_comes_first(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "model.onnx", channels=1, size=2)
    first = explain.explain(look(in_int8(path)), look(path), VNNI)[0]
    assert first.cause == "call_overhead" and "for the call" in first.evidence


def test_operators_that_stay_in_float_and_the_conversions_around_them(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "model.onnx", between=("Relu", "Erf", "Cos"))
    baseline, seen = look(path), look(in_int8(path))
    found = {finding.cause: finding for finding in explain.explain(seen, baseline)}
    assert "3 Cos" in found["float_operators"].evidence and "3 Erf" in found["float_operators"].evidence
    conversions = explain.unfused_qdq(seen)
    assert conversions and "Quantize" in conversions.evidence
    assert "float_operators" not in causes(explain.explain(baseline, baseline))  # nothing in it is quantised


def test_signed_activations_need_an_instruction(tmp_path: Path) -> None:
    path = convolutions(tmp_path / "model.onnx")
    signed = look(in_int8(path, QuantType.QInt8))
    finding = explain.missing_instructions(signed, VNNI)
    assert finding and "S8S8" in finding.evidence and "signedness=u8s8" in finding.remedy
    assert explain.missing_instructions(signed, VNNI | {"avx_vnni_int8"}) is None
    assert explain.missing_instructions(signed, {"asimd", "asimddp"}) is None


def test_unsigned_activations_need_a_dot_product(tmp_path: Path) -> None:
    seen = look(in_int8(convolutions(tmp_path / "model.onnx")))
    assert explain.missing_instructions(seen, VNNI) is None
    finding = explain.missing_instructions(seen, {"avx2"})
    assert finding and "no int8 dot product" in finding.evidence


@pytest.mark.parametrize(("channels", "is_named"), [(4, True), (16, False), (17, True)])
def test_channels_that_do_not_fill_a_vector(tmp_path: Path, channels: int, is_named: bool) -> None:
    seen = look(in_int8(convolutions(tmp_path / "model.onnx", channels=channels)))
    finding = explain.channels_off_vector_width(seen)
    assert (finding is not None) == is_named
    assert finding is None or f"{channels} output channels" in finding.evidence


def graph(*kinds: str, ms: float = 1.0) -> Inspection:
    """What such a graph would be told as."""
    nodes = tuple(
        Node(
            name=f"{kind}_{i}", kind=kind, domain="", inputs=(), outputs=(), attributes={}, kernel_ms=ms
        )
        for i, kind in enumerate(kinds)
    )  # fmt: skip
    return Inspection(
        threads=1, nodes=nodes, tensors={}, p50_ms=ms * len(nodes), call_ms=0.01, dispatch_ms=0.0, clock_ms=0.0, calls=1
    )


def test_fusions_that_came_apart_count_by_the_time_they_add() -> None:
    apart, fused = graph("QGemm", "Erf", "Mul", "Add"), graph("Gemm", "BiasGelu")
    finding = explain.more_operators(apart, fused)
    assert finding and finding.share == pytest.approx(2 / apart.total_ms)
    assert "instead of 1 BiasGelu" in finding.evidence
    assert explain.more_operators(graph("QLinearConv", "QuantizeLinear"), graph("FusedConv")) is None


def test_integer_kernels_are_compared_with_the_float_ones_that_they_replace() -> None:
    finding = explain.slower_kernels(graph("QLinearSoftmax", ms=3.0), graph("Softmax", ms=1.0))
    assert finding and finding.share == pytest.approx(2 / 3.01)
    assert explain.slower_kernels(graph("QLinearConv", ms=1.0), graph("Conv", ms=2.0)) is None


def test_layouts_and_threads() -> None:
    layouts = explain.layout_conversions(graph("ReorderInput", "Conv", "ReorderOutput"))
    assert layouts and "ReorderInput" in layouts.evidence
    threads = explain.thread_oversubscription(replace(graph("Conv"), threads=8), cores=2)
    assert threads and isinstance(threads.share, NotMeasured) and "target.threads=2" in threads.remedy
    assert explain.thread_oversubscription(graph("Conv"), cores=2) is None


def test_a_graph_that_nothing_changed_is_told_before_its_overhead() -> None:
    idle = graph("Gemm", ms=0.0)  # the overhead is the whole call, so both causes have the same share
    assert causes(explain.explain(idle, idle))[:2] == ["same_graph", "call_overhead"]
    assert explain.operators(idle) == []  # no share of nothing


@pytest.fixture
def small_task() -> Task:
    data = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.long))]
    return Task(
        train=data, validation=data, calibration=data, test=data, example_inputs=data[0][0], metric=top1_accuracy()
    )


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def no_faster(measurement: Measurement) -> Measurement:
    """`measurement`, whatever two processes and one round said by chance."""
    assert not isinstance(measurement.latency, NotMeasured)
    return replace(measurement, latency=[replace(row, verdict_same_runtime="same") for row in measurement.latency])


def test_a_measurement_gets_its_findings_and_slowest_operators(tmp_path: Path, small_task: Task) -> None:
    model = small_model()
    settings = Measure(replicas=2, rounds=1, block_seconds=0.001, max_seconds=0.1, noise_limit=1000.0)
    folder = tmp_path / "01_same"
    for made in (folder, tmp_path / "00_baseline"):
        made.mkdir()
    with Bench(settings, tmp_path / "logs") as bench:
        measurer = Measurer(small_task, Target(), settings, tmp_path, bench)
        untimed, saved = measurer.baseline(Artifact.save(model, tmp_path / "00_baseline")), Artifact.save(model, folder)
        measurement = no_faster(measurer.measure(saved))
        explained = measurer.explained(measurement, saved)
        assert measurer.explained(untimed, saved) == untimed  # runs in PyTorch, which has no such profile
    assert causes(explained.findings)[:2] == ["same_graph", "call_overhead"]  # nothing was done to it, and it is tiny
    assert [operator.ms for operator in explained.operators] == sorted(
        (operator.ms for operator in explained.operators), reverse=True
    )
    assert sum(operator.share for operator in explained.operators) == pytest.approx(1)


def test_figures_belong_to_the_model_not_to_its_folder(tmp_path: Path, small_task: Task) -> None:
    settings = Measure(replicas=2, rounds=1, block_seconds=0.001, max_seconds=0.1, noise_limit=1000.0, explain=False)
    folder = tmp_path / "01_wide"
    for made in (folder, tmp_path / "00_baseline"):
        made.mkdir()
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 2)).eval()
    with Bench(settings, tmp_path / "logs") as bench:
        measurer = Measurer(small_task, Target(), settings, tmp_path, bench)
        measurer.baseline(Artifact.save(small_model(), tmp_path / "00_baseline"))
        narrow = Artifact.save(small_model(), folder)
        small, large = measurer.measure(narrow), measurer.measure(Artifact.save(wide, folder))
        assert measurer.explained(small, narrow) == small  # nobody asked
    assert isinstance(small.size_bytes, int) and isinstance(large.size_bytes, int)
    assert large.size_bytes > 10 * small.size_bytes
    assert small.latency != large.latency


def test_noise_takes_the_times_but_not_the_memory(tmp_path: Path, small_task: Task) -> None:
    settings = Measure(
        replicas=2, rounds=1, block_seconds=0.001, max_seconds=0.1, interval_width=1e-9, noise_limit=1e-9
    )
    (tmp_path / "00_baseline").mkdir()
    with Bench(settings, tmp_path / "logs") as bench:
        saved = Artifact.save(small_model(), tmp_path / "00_baseline")
        baseline = Measurer(small_task, Target(), settings, tmp_path, bench).baseline(saved)
    assert isinstance(baseline.latency, NotMeasured) and "the machine is too noisy" in baseline.latency.not_measured
    assert isinstance(baseline.peak_memory_bytes, int) and baseline.peak_memory_bytes > baseline.size_bytes > 0

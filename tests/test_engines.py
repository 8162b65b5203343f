"""Engines: their settings, the choice among them, and what happens where one fails."""

from __future__ import annotations

import json
from pathlib import Path

import my_network
import numpy as np
import pytest
import torch

import optpipe
from optpipe import StageError, lower
from optpipe.forms import form
from optpipe.measure.latency import Bench
from optpipe.measure.measurer import Measurer
from optpipe.measure.settings import Measure
from optpipe.report import samples
from optpipe.runtimes import OPTIONS, RUNTIMES, engine_of, make_runner, setting_problems
from optpipe.target import Target

SHORT = ("measure=quick", "measure.noise_limit=1000", "tracking=none", "target.batch_sizes=[1]", "benchmark.callers=[]")


def test_the_fastest_engine_that_is_installed_is_the_deployed_one(project: Path) -> None:
    pytest.importorskip("openvino")
    words = [*SHORT, "benchmark=runtimes", "pipeline=[trace,export,benchmark]"]
    result = optpipe.optimize(recipe="clip_int8", overrides=words, config_dir="my_conf", output=project / "run")
    stage = result.report.stages[-1]
    assert {attempt.method for attempt in stage.attempts} == {"onnxruntime", "openvino"}
    assert len({(attempt.latency.replicas, attempt.latency.other_load_cores) for attempt in stage.attempts}) == 1
    for attempt in stage.attempts:  # which took turns in one comparison
        assert set(samples.calls(project / "run", attempt.latency)) == {"subject", "eager", "exported"}
    (chosen,) = [attempt for attempt in stage.attempts if attempt.chosen]
    manifest = json.loads((project / "run" / "model" / "manifest.json").read_text())
    assert manifest["runtime"] == chosen.method == result.latency.runtime
    assert f"{chosen.method} runs the model from here on" in " ".join(stage.notes)
    images = next(iter(my_network.pixels().test))[0].numpy()
    assert optpipe.load(project / "run")(images).shape == (len(images), 10)


def test_every_engine_has_options_and_forms() -> None:
    assert OPTIONS.keys() == RUNTIMES.keys()
    assert engine_of("onnx") == "onnxruntime" and engine_of("onnx", "openvino") == "openvino"
    assert engine_of("torchscript", "onnxruntime") == "torch"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("onnxruntime", {"spinning": False, "arena": False, "graph_level": "basic", "inter_threads": 2}),
        ("openvino", {"precision": "bf16", "streams": 2}),
        ("torch", {"channels_last": True, "autocast": "bf16"}),
    ],
)
def test_options_change_how_and_hardly_what_is_computed(name: str, options: dict, tmp_path: Path) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    task, model = my_network.pixels(), my_network.perceptron().eval()
    given = model if name == "torch" else lower.to_onnx(lower.trace(model, task), tmp_path / "model.onnx")
    images = next(iter(task.test))[0].numpy()
    plain, changed = (make_runner(name, given, 1, "cpu", each)(images)[0] for each in ({}, options))
    assert np.abs(plain - changed).max() < 0.02 * np.abs(plain).max() + 1e-6


def test_options_reach_the_engine() -> None:
    from optpipe.runtimes.onnxruntime import session_options

    options = OPTIONS["onnxruntime"](spinning=False, arena=False, graph_level="basic", inter_threads=2)
    session = session_options(3, options)
    assert (session.intra_op_num_threads, session.inter_op_num_threads) == (3, 2)
    assert not session.enable_cpu_mem_arena and session.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert session.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_autocast_rounds_what_torch_computes() -> None:
    torch.manual_seed(0)
    model, images = my_network.perceptron().eval(), next(iter(my_network.pixels().test))[0].numpy()
    plain, rounded = (make_runner("torch", model, 1, "cpu", each)(images)[0] for each in ({}, {"autocast": "bf16"}))
    assert rounded.dtype == np.float32 and 0 < np.abs(plain - rounded).max() < 0.02 * np.abs(plain).max()


@pytest.mark.parametrize(
    ("name", "device", "options", "words"),
    [
        ("openvino", "cuda", {}, "openvino runs on cpu here"),
        ("tensorrt", "cpu", {}, "runs on a GPU; set target.device=cuda"),
        ("openvino", "cpu", {"precision": "f64"}, "precision is 'f64'; it must be one of f32, bf16, f16"),
        ("torch", "cpu", {"autocast": "f8"}, "autocast is 'f8'"),
        ("aotinductor", "cpu", {"spinning": True}, "aotinductor has no option 'spinning'; it has none"),
    ],
)
def test_settings_that_an_engine_does_not_have(name: str, device: str, options: dict, words: str) -> None:
    assert words in setting_problems(name, device, 1, options)[0]


def test_executorch_has_no_setting_for_threads() -> None:
    assert "always use every core; set it to" in setting_problems("executorch", "cpu", 7777, {})[0]


def test_openvino_compiles_for_some_shapes_and_once_for_all_others(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    task, model = my_network.pixels(), my_network.perceptron().eval()
    exported = lower.to_onnx(lower.trace(model, task), tmp_path / "model.onnx")
    images = next(iter(task.test))[0]
    with torch.no_grad():
        expected = model(images).numpy()
    for shapes in (0, 2):
        run = make_runner("openvino", exported, 1, "cpu", {"shapes": shapes})
        for size in (1, 5, 3, 64, 1, 3):
            assert np.allclose(run(images[:size].numpy())[0], expected[:size], atol=1e-5)


def test_an_engine_that_fails_in_its_own_process_is_an_error_of_the_stage(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "model.xml").write_text("<net></net>")
    (tmp_path / "model.bin").write_bytes(b"")
    settings = Measure()
    with Bench(settings, tmp_path / "workers") as bench:
        measurer = Measurer(my_network.pixels(), Target(runtime="openvino"), settings, tmp_path, bench)
        with pytest.raises(StageError, match="openvino cannot run this model: the process"):
            with measurer.evaluating(form("openvino").load(tmp_path)):
                pass

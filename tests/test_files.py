"""A model that starts as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import my_network
import onnx
import pytest
import torch

import optpipe
from optpipe import lower

QUICK = ("target.instruction_set=neon", "tracking=none", "data=mine")


@pytest.fixture
def onnx_file(project: Path) -> Path:
    return _files(project)[0]


@pytest.fixture
def program_file(project: Path) -> Path:
    return _files(project)[1]


def _files(project: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    program = lower.trace(my_network.perceptron(), my_network.pixels())
    exported = lower.to_onnx(program, project / "theirs.onnx", input_names=["pixels"])
    torch.export.save(program, project / "theirs.pt2")
    return exported.path, project / "theirs.pt2"


def run(project: Path, *overrides: str) -> Any:
    found = optpipe.optimize(
        recipe="edge_int8", overrides=[*QUICK, *overrides], config_dir="my_conf", output=project / "run"
    )
    return found.report


def refused(project: Path, *overrides: str) -> str:
    with pytest.raises(optpipe.RecipeError) as error:
        run(project, *overrides)
    return str(error.value)


def test_an_onnx_file_is_benchmarked_and_deployed_as_it_is(project: Path, onnx_file: Path) -> None:
    report = run(project, "model=onnx", f"model.path={onnx_file}", "pipeline=[benchmark]")
    assert report.status == "ok" and report.stages[0].form == "onnx"
    assert report.final.measurement.size_bytes == report.baseline.size_bytes == onnx_file.stat().st_size
    images = next(iter(my_network.pixels().test))[0]
    assert optpipe.load(project / "run")(images.numpy()).shape == (64, 10)


def test_an_onnx_file_becomes_an_openvino_ir(project: Path, onnx_file: Path) -> None:
    pytest.importorskip("openvino")
    words = ("model=onnx", f"model.path={onnx_file}", "export=openvino", "target.runtime=openvino", "pipeline=[export]")
    report = run(project, *words)
    assert report.stages[0].form == "openvino" and "0 of 64 labels flip" in " ".join(report.stages[0].notes)


def test_an_exported_program_is_exported(project: Path, program_file: Path) -> None:
    report = run(project, "model=program", f"model.path={program_file}", "pipeline=[export,benchmark]")
    assert [stage.form for stage in report.stages] == ["onnx", "onnx"]


def test_stages_that_need_a_module_are_refused_with_the_reason(project: Path, onnx_file: Path) -> None:
    said = refused(project, "model=onnx", f"model.path={onnx_file}", "pipeline=[quantize,benchmark]")
    assert "step 'quantize' takes a torch module, but the model is an ONNX file" in said


@pytest.mark.parametrize("kind", ["onnx", "program"])
def test_a_file_that_is_none_is_refused(project: Path, kind: str) -> None:
    (project / "notes.txt").write_text("no model")
    said = refused(
        project,
        f"model={kind}",
        "model.path=notes.txt",
        "pipeline=[benchmark]" if kind == "onnx" else "pipeline=[export]",
    )
    assert "which cannot be read as" in said
    assert "which is not a file" in refused(project, f"model={kind}", "model.path=nowhere", "pipeline=[benchmark]")
    assert f"model={kind} needs model.path=" in refused(project, f"model={kind}", "pipeline=[benchmark]")


def test_weights_in_a_file_of_another_name_are_refused_with_a_remedy(project: Path, onnx_file: Path) -> None:
    onnx.save_model(onnx.load(onnx_file), "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    said = refused(project, "model=onnx", "model.path=big.onnx", "pipeline=[benchmark]")
    assert "its weights lie in big.bin" in said and "location='model.onnx.data'" in said

"""The main job, end to end: what `python -m optpipe +recipe=edge_int8` leaves, and that it repeats."""

from __future__ import annotations

import collections
import hashlib
import json
import sqlite3
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Finished, finish, start

STAGES = ["simplify", "prune", "distill", "quantize", "trace", "export", "benchmark"]


def test_both_of_two_first_runs_at_once_succeed(edge_runs: tuple[Finished, Finished]) -> None:
    for run in edge_runs:
        assert run.code == 0, run.err
        assert run.report["status"] == "ok"
    assert sum("Training the reference network" in run.err for run in edge_runs) == 1  # the other one waited for it


def test_runs_in_two_folders_give_the_same_bytes(edge_runs: tuple[Finished, Finished]) -> None:
    first, second = ((run.run / "model" / "model.onnx").read_bytes() for run in edge_runs)
    assert first == second


def test_every_stage_has_its_figures(edge_run: Finished) -> None:
    stages = edge_run.report["stages"]
    assert [stage["key"] for stage in stages] == STAGES
    for stage in stages:
        assert stage["status"] == "ok"
        measurement = stage["measurement"]
        assert measurement["size_bytes"] > 0 and measurement["peak_memory_bytes"] > 0
        assert measurement["quality"]["n"] == 450
        low, high = measurement["quality"]["ci95"]
        assert low <= measurement["quality"]["value"] <= high
        for entry in measurement["latency"]:
            assert 0 < entry["p50_ms"] <= entry["p95_ms"]
            assert entry["speedup_ci95"][0] <= entry["speedup"] <= entry["speedup_ci95"][1]


def test_the_model_that_comes_out_is_smaller_and_faster_than_what_went_in(edge_run: Finished) -> None:
    report = edge_run.report
    final = report["final"]["measurement"]
    assert final["size_bytes"] * 10 < report["baseline"]["size_bytes"]
    assert all(entry["verdict"] == "faster" for entry in final["latency"])
    assert final["latency"][0]["speedup_same_runtime"] > 2


def test_every_point_of_the_grid_has_a_figure_or_a_reason(edge_run: Finished) -> None:
    sizes = [entry["batch_size"] for entry in edge_run.report["final"]["measurement"]["latency"]]
    notes = edge_run.report["stages"][-1]["notes"]
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    for size in (1, 4, 8, 16):
        assert (size in sizes) != any(note.startswith(f"not measured, batch {size}, 1 thread(s): ") for note in notes)


def test_sizes_are_those_of_the_files(edge_run: Finished) -> None:
    report = edge_run.report
    artifact = edge_run.run / report["final"]["artifact"]
    assert report["final"]["measurement"]["size_bytes"] == artifact.stat().st_size
    assert report["baseline"]["size_bytes"] == (edge_run.run / "00_baseline" / "weights.safetensors").stat().st_size


def test_equal_files_are_timed_once(edge_run: Finished) -> None:
    quantize, trace, export = (stage["measurement"]["latency"][0] for stage in edge_run.report["stages"][3:6])
    assert quantize["samples"] == trace["samples"] == export["samples"]


def test_report_has_the_keys_of_the_contract(edge_run: Finished) -> None:
    report = edge_run.report
    top = "schema status recipe overrides mlflow_run_id seconds environment baseline stages final budget"
    assert set(top.split()) <= set(report)
    assert set("cpu isa cores versions git".split()) <= set(report["environment"])
    stage = "key stage status cached seconds form attempts notes measurement"
    assert all(set(stage.split()) <= set(result) for result in report["stages"])
    measurement = report["final"]["measurement"]
    assert set("metric value ci95 n delta delta_ci95".split()) <= set(measurement["quality"])
    latency = (
        "runtime batch_size threads p50_ms p95_ms std_ms throughput speedup speedup_ci95 speedup_same_runtime verdict"
    )
    assert set(latency.split()) <= set(measurement["latency"][0])


def test_every_convolution_and_linear_layer_runs_in_integers(edge_run: Finished, tmp_path: Any) -> None:
    import onnx
    import onnxruntime as ort

    exported = edge_run.run / "model" / "model.onnx"
    counts = collections.Counter(node.op_type for node in onnx.load(exported).graph.node)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(exported), options, providers=["CPUExecutionProvider"])
    optimised = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["Conv"] == 9 and counts["Gemm"] == 1
    assert optimised["QLinearConv"] == counts["Conv"]
    assert optimised["QGemm"] == counts["Gemm"]
    assert optimised["QLinearAdd"] == counts["Add"] == 3
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add"} & set(optimised)


def test_the_file_holds_nothing_but_the_model(edge_run: Finished) -> None:
    exported = (edge_run.run / "model" / "model.onnx").read_bytes()
    for secret in (b".py", b"stack_trace", b"site-packages", b"/home", b"/tmp"):
        assert secret not in exported


def test_load_gives_a_callable_that_answers_as_the_report_says(edge_run: Finished) -> None:
    import optpipe
    from optpipe.zoo import digits

    model = optpipe.load(edge_run.run)
    hits = [model(images.numpy()).argmax(1) == labels.numpy() for images, labels in digits.task().test]
    assert np.concatenate(hits).mean() == pytest.approx(edge_run.report["final"]["measurement"]["quality"]["value"])
    assert model(image=np.zeros((3, 1, 32, 32), np.float32)).shape == (3, 10)  # by name, any batch size


def test_manifest_describes_the_file(edge_run: Finished) -> None:
    folder = edge_run.run / "model"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["model.onnx"]["sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert manifest["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 32, 32]}]
    assert manifest["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}]


def test_load_refuses_a_file_that_was_changed(edge_run: Finished, tmp_path: Any) -> None:
    import shutil

    import optpipe

    shutil.copytree(edge_run.run / "model", tmp_path / "model")
    with (tmp_path / "model" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(optpipe.OptpipeError, match="is not the file that the run wrote"):
        optpipe.load(tmp_path)
    with pytest.raises(optpipe.OptpipeError, match="holds no deployed model"):
        optpipe.load(tmp_path / "nowhere")


def test_mlflow_holds_the_run_its_stages_and_its_files(edge_run: Finished) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{edge_run.folder / 'mlflow.db'}")
    parent = client.get_run(edge_run.report["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    for stage in STAGES:
        for metric in ("size_bytes", "p50_ms", "quality"):
            assert f"{stage}/{metric}" in parent.data.metrics
    final = edge_run.report["final"]["measurement"]
    assert parent.data.metrics["final/size_bytes"] == final["size_bytes"]
    assert parent.data.metrics["final/quality"] == pytest.approx(final["quality"]["value"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["start_time"]
    )
    assert [child.info.run_name for child in children] == STAGES
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"config.json", "report.json", "report.html", "model"} <= artifacts
    assert parent.data.params["prune.ratio"] == "0.7"


def test_the_plan_says_what_the_store_has(edge_run: Finished, cache: Path, tmp_path: Path) -> None:
    store = f"store.folder={edge_run.folder.parent / 'store'}"
    words = ("+recipe=edge_int8", "distill.epochs=2", store, "dry_run=true")
    same = finish(start(tmp_path, *words, cache=cache), tmp_path).out
    assert same.count("-> torch  in the store") == 4 and "3. distill" in same
    other = finish(start(tmp_path, *words, "quantize=dynamic", cache=cache), tmp_path).out
    assert other.count("  in the store\n") == 3 and "not computed again, unless code or data have changed" in other


def test_the_store_is_private(edge_run: Finished) -> None:
    database = edge_run.folder / "mlflow.db"
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    assert stat.S_IMODE((edge_run.folder / "mlruns").stat().st_mode) == 0o700
    assert sqlite3.connect(database).execute("select count(*) from runs").fetchone()[0] == 1 + len(STAGES)

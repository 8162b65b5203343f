"""Bad models, bad data, bad stages and bad folders: one clear message, and nothing that was finished is lost."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import my_network
import pytest
import torch
from command import finish, start
from torch import nn

import optpipe
from optpipe import run_folder
from optpipe.errors import RecipeError

# Timing is left out: a target that is not this machine is not timed.
ELSEWHERE = "target.instruction_set=neon"
QUICK = (ELSEWHERE, "tracking=none", "measure.previews=false")


def refused(project: Path, *overrides: str, model: Any = None, task: Any = None) -> str:
    with pytest.raises(optpipe.RecipeError) as error:
        optpipe.optimize(
            model,
            task,
            recipe="clip_int8",
            overrides=[*QUICK, *overrides],
            config_dir="my_conf",
            output=project / "run",
        )
    assert not (project / "run" / "report.json").exists()  # no work was started
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+data.args.empty=calibration"], ["the calibration split is empty"]),
        (["+data.args.empty=test"], ["the test split is empty"]),
        (["model.args.hidden=32"], ["my_weights.safetensors", "does not fit Perceptron", "size mismatch"]),
        (["model.factory=my_network.perceptrn"], ["no callable 'perceptrn'", "did you mean 'perceptron'?"]),
        (["model.args.hidden=-1"], ["model.factory 'my_network.perceptron' raised"]),
        (["data.factory=my_network.untyped"], ["data: the factory returned dict; it must return an optpipe.Task"]),
        (["model.weights=my_network.py"], ["my_network.py", "cannot be read as a state dict"]),
        (
            ["+clip@nobody=missing", "pipeline=[nobody]"],
            ["needs a_package_nobody_has", 'pip install "optpipe[nobody]"'],
        ),
        (["clip.limit=-1"], ["clip: limit is -1.0; it must be above 0"]),
        (["clip=broken", "clip.layer=middle"], ["clip.layer=middle", "first", "last"]),
    ],
)
def test_a_bad_setting_is_refused_before_any_work(project: Path, overrides: list[str], expected: list[str]) -> None:
    text = refused(project, *overrides)
    for part in expected:
        assert part in text


def test_weights_that_execute_code_are_refused(project: Path) -> None:
    torch.save(my_network.Perceptron(), project / "pickled.pt")
    text = refused(project, "model.weights=pickled.pt")
    assert "cannot be read as a state dict" in text and "torch.save(model.state_dict(), path)" in text


def test_nan_in_the_weights_names_the_tensor(project: Path) -> None:
    model = my_network.Perceptron()
    model.layers[3].bias.data[2] = float("nan")
    assert "NaN or infinity in 'layers.3.bias'" in refused(project, model=model)


def test_inputs_of_the_wrong_shape_are_shown(project: Path) -> None:
    text = refused(project, model=nn.Linear(63, 10))
    assert "does not accept example_inputs, shapes [(4, 64)]" in text and "63" in text


def test_outputs_with_nan_are_refused(project: Path) -> None:
    class Divides(my_network.Perceptron):
        def forward(self, pixels):
            return super().forward(pixels) / 0.0 * 0.0

    assert "returns NaN or infinity" in refused(project, model=Divides())


def test_a_metric_that_does_not_judge_each_sample_is_refused(project: Path) -> None:
    task = my_network.pixels()
    task.metric = optpipe.Metric(name="mean", score=lambda logits, target: (logits.argmax(1) == target).float().mean())
    assert "metric 'mean' gave 1 scores for 64 samples" in refused(project, task=task)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", ["stage 'clip/broken' raised KeyError", "layer_that_is_not_there"]),
        ("refuse", ["this model has no layer to break"]),
        ("wrong form", ["gives form 'torch' but returned str"]),
        ("nan", ["NaN or infinity"]),
    ],
)
def test_a_stage_that_fails_is_named_and_the_rest_is_kept(project: Path, how: str, expected: list[str]) -> None:
    overrides = [*QUICK, "clip=broken", f"clip.how={how}"]
    with pytest.raises(optpipe.StageError) as error:
        optpipe.optimize(recipe="clip_int8", overrides=overrides, config_dir="my_conf", output=project / "run")
    for part in [*expected, "while running step 2 of 6, 'clip', in"]:
        assert part in str(error.value)
    report = json.loads((project / "run" / "report.json").read_text())
    assert report["status"] == "failed"
    assert [stage["status"] for stage in report["stages"]] == ["ok", "failed"]
    assert report["stages"][0]["measurement"]["quality"]["n"] == 397
    assert "not_measured" in report["final"]


def test_a_failed_run_exits_with_one_message_and_is_marked_in_mlflow(optpipe: Any) -> None:
    done = optpipe("+recipe=clip_int8", "--config-dir", "my_conf", ELSEWHERE, "clip=broken")
    assert done.code == 1
    assert "StageError: stage 'clip/broken' raised KeyError" in done.err
    assert "Traceback" not in done.err + done.out
    assert status_in_mlflow(done) == "FAILED"
    assert "Traceback" in (done.run / "optpipe.log").read_text()


def test_ctrl_c_keeps_what_was_finished(project: Path, cache: Path, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, project / "mlflow.db")
    words = ("+recipe=clip_int8", "--config-dir", "my_conf", ELSEWHERE, "distill.epochs=100000", "rehearse=false")
    process = start(project, *words, "pipeline=[simplify,distill,trace,export]", cache=cache)
    folder = project / "outputs" / "runs"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/02_distill")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    done = finish(process, project)
    assert done.code == 130
    assert "Interrupted" in done.err and "Traceback" not in done.err
    assert [stage["status"] for stage in done.report["stages"]] == ["ok", "failed"]
    assert status_in_mlflow(done) == "KILLED"


def test_a_folder_that_cannot_be_written_is_refused(optpipe: Any, project: Path) -> None:
    (project / "taken").write_text("a file")
    done = optpipe("+recipe=clip_int8", "--config-dir=my_conf", "hydra.run.dir=taken/run")
    assert done.code == 1
    assert "cannot write to 'taken/run'" in done.err and "hydra.run.dir" in done.err
    assert "Traceback" not in done.err


def test_a_named_folder_is_one_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_folder.held(folder, "this run"):
        (folder / "01_prune").mkdir()
        with pytest.raises(RecipeError, match="another process runs in"), run_folder.held(folder, "this run"):
            pass
    (folder / "notes.txt").write_text("of the user, who looked at what failed")
    with run_folder.held(folder, "this run"):
        assert [path.name for path in folder.glob("[!.]*")] == ["notes.txt"]
    (folder / "report.json").write_text('{"status": "ok"}')  # and killed before it could say that it ended well
    with pytest.raises(RecipeError, match="holds a run that is done; choose"), run_folder.held(folder, "this run"):
        pass
    assert (folder / "report.json").exists()


def test_a_folder_of_the_users_is_left_alone(optpipe: Any, project: Path) -> None:
    before = sorted(project.iterdir())
    done = optpipe("+recipe=clip_int8", "--config-dir=my_conf", "hydra.run.dir=.")
    assert done.code == 1 and "'.' holds other files; choose another folder with hydra.run.dir=" in done.err
    assert sorted(project.iterdir()) == sorted({*before, project / "mlflow.db"})


def status_in_mlflow(done: Any) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{done.folder / 'mlflow.db'}")
    return client.get_run(done.report["mlflow_run_id"]).info.status

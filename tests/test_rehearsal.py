"""The rehearsal: what would fail late fails first, and the run comes out as it would have without."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from my_network import pixels
from torch.utils.data import DataLoader, TensorDataset

import optpipe
from optpipe.report import NotMeasured, Report
from optpipe.report.console import forecast

QUICK = ("target.instruction_set=neon", "tracking=none", "measure.previews=false")
TRAINS = ("distill.epochs=3", "pipeline=[distill,quantize,trace,export]")
SLOW_LOSS_SECONDS = 0.02


@optpipe.register("late/fails", takes="program", gives="onnx")
@dataclass(kw_only=True)
class Fails:
    """An export that cannot."""

    def run(self, model: Any, ctx: optpipe.Context) -> Any:
        raise optpipe.StageError("this graph has an operator that the format has not")


@optpipe.register("late/looks", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Looks:
    """Reads the training data, and says how much of it there was."""

    passes: int = 1

    def run(self, model: Any, ctx: optpipe.Context) -> Any:
        batches = [torch.is_tensor(x) and time.sleep(0.01) for _ in range(self.passes) for x, _ in ctx.task.train]
        ctx.record(batches=len(batches))
        return model


def run(project: Path, *overrides: str, folder: str = "run", **given: Any) -> Report:
    made = optpipe.optimize(
        recipe="clip_int8",
        overrides=[*QUICK, *overrides],
        config_dir="my_conf",
        output=project / folder,
        **given,
    )
    return made.report


def refused(project: Path, *overrides: str, **given: Any) -> tuple[str, Report]:
    with pytest.raises(optpipe.StageError) as error:
        run(project, *overrides, **given)
    return str(error.value), Report.read(project / "run")


def content(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "model.onnx").read_bytes()).hexdigest()


def test_what_would_fail_after_the_training_fails_before_it(project: Path) -> None:
    said, report = refused(project, "distill.epochs=100000", "+late=fails", "pipeline=[simplify,distill,trace,late]")
    for part in ("this graph has an operator", "in the rehearsal, before anything was trained", "step 4 of 4, 'late'"):
        assert part in said
    assert report.status == "failed" and said in report.error
    assert [(stage.key, stage.status) for stage in report.stages] == [("late", "failed")]
    assert isinstance(report.baseline, NotMeasured)
    assert (project / "run" / "00_rehearsal" / "4_late").is_dir()  # to look at
    assert "the run ended at step <b>late</b>" in (project / "run" / "report.html").read_text()


def test_the_command_ends_with_an_error(optpipe: Any, project: Path) -> None:
    words = ("+recipe=clip_int8", "--config-dir=my_conf", *QUICK, "distill.epochs=100000", "+clip@broken=broken")
    ended = optpipe(*words, "pipeline=[distill,broken,trace,export]")
    assert ended.code == 1
    assert "in the rehearsal" in ended.err and "step 2 of 4, 'broken'" in ended.err and "KeyError" in ended.err


def test_a_rehearsal_changes_nothing_in_what_comes_out(project: Path) -> None:
    with_it, without = run(project, *TRAINS), run(project, *TRAINS, "rehearse=false", folder="without")
    assert content(project / "run") == content(project / "without")
    assert [stage.facts.get("losses") for stage in with_it.stages] == [
        stage.facts.get("losses") for stage in without.stages
    ]
    assert not (project / "run" / "00_rehearsal").exists()
    assert with_it.rehearsal_seconds > 0 == without.rehearsal_seconds
    assert all(isinstance(stage.predicted_seconds, NotMeasured) for stage in without.stages)
    assert not forecast(without)


@pytest.fixture
def kept(tmp_path: Path) -> tuple[str, ...]:
    """A store of the test's own."""
    return ("store=user", f"store.folder={tmp_path / 'store'}")


@pytest.fixture
def task() -> optpipe.Task:
    """One whose results can be used again."""
    made = pixels()
    made.fingerprint = "scikit-learn digits"
    return made


def test_the_same_stages_with_other_numbers_are_not_rehearsed_again(
    project: Path, kept: tuple[str, ...], task: optpipe.Task, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(project, *TRAINS, *kept, task=task)
    other = run(project, *TRAINS, *kept, "distill.epochs=2", folder="other", task=task)
    assert first.rehearsal_seconds > 1 > other.rehearsal_seconds
    assert "these stages were rehearsed before, set to other numbers" in capsys.readouterr().err
    assert all(isinstance(stage.predicted_seconds, NotMeasured) for stage in other.stages)
    asked = run(project, *TRAINS, *kept, "distill.epochs=1", "rehearse=true", folder="asked", task=task)
    assert asked.rehearsal_seconds > 1


def test_what_the_store_holds_is_not_rehearsed(
    project: Path, kept: tuple[str, ...], task: optpipe.Task, capsys: pytest.CaptureFixture[str]
) -> None:
    run(project, *kept, "distill.epochs=1", "pipeline=[simplify,distill]", task=task)
    capsys.readouterr()
    chain = "pipeline=[simplify,distill,distill_more,quantize,trace,export]"
    report = run(project, *kept, "distill.epochs=1", "+distill@distill_more=logits", chain, folder="more", task=task)
    assert "rehearsal: 4 steps" in capsys.readouterr().err
    assert [stage.key for stage in report.stages if stage.cached] == ["simplify", "distill"]
    assert [stage.key for stage in report.stages if not isinstance(stage.predicted_seconds, NotMeasured)] == [
        "distill_more", "quantize", "trace", "export",
    ]  # fmt: skip
    other = run(project, *kept, "distill.epochs=2", "+distill@distill_more=logits", chain, folder="other", task=task)
    assert other.rehearsal_seconds > 1  # its first distillation never was


def test_data_that_are_shuffled_come_in_the_same_order(project: Path) -> None:
    def task() -> optpipe.Task:
        made = pixels()
        data = TensorDataset(*(torch.cat(part) for part in zip(*made.train, strict=True)))
        made.train = DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(1))
        return made

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run(project, *TRAINS, task=task())
    torch.set_rng_state(state)
    run(project, *TRAINS, "rehearse=false", folder="without", task=task())
    torch.set_num_threads(threads)
    assert content(project / "run") == content(project / "without")


def test_every_step_is_predicted(project: Path) -> None:
    def loss(outputs: Any, target: Any) -> torch.Tensor:
        time.sleep(SLOW_LOSS_SECONDS)
        return torch.nn.functional.cross_entropy(outputs, target)

    task = pixels()
    task.loss = loss
    report = run(project, "distill=finetune", *TRAINS, task=task)
    for stage in report.stages:
        assert stage.predicted_seconds > 0 and stage.seconds > 0
        assert stage.peak_memory_bytes > 0 and stage.predicted_peak_memory_bytes > 0
    trained = report.stages[0]
    assert len(trained.facts["epoch_seconds"]) == 3
    least = 3 * 0.9 * len(task.train) * SLOW_LOSS_SECONDS
    assert least < trained.predicted_seconds < 3 * trained.seconds
    assert "Predicted by the rehearsal, and real" in (project / "run" / "report.html").read_text()
    (said,) = forecast(report)
    assert "predicted by a rehearsal of" in said


def test_a_stage_that_reads_data_is_predicted_by_their_number(project: Path) -> None:
    report = run(project, "rehearse=true", "+late=looks", "late.passes=3", "pipeline=[late,trace,export]")
    (stage, *_) = report.stages
    assert stage.facts["batches"] == 3 * len(pixels().train)
    assert stage.seconds / 2 < stage.predicted_seconds < stage.seconds * 2


def test_pipelines_that_train_nothing_are_not_rehearsed(project: Path) -> None:
    report = run(project, "pipeline=[quantize,trace,export]")
    assert report.rehearsal_seconds == 0 and not (project / "run" / "00_rehearsal").exists()


def test_the_state_of_a_training_that_goes_on_is_left_alone(project: Path) -> None:
    kept = project / "kept"
    kept.mkdir()
    (kept / "training.ckpt").write_text("not the rehearsal's to read, nor to remove")
    text = "cannot be read as the state of a training"
    said, _ = refused(project, *TRAINS, f"distill.checkpoint={kept}")
    assert text in said and "rehearsal" not in said  # it was the training itself that met it
    assert (kept / "training.ckpt").exists()


def test_an_alternative_that_fails_is_no_reason_to_stop(project: Path) -> None:
    pipeline = "pipeline=[{first_of:[broken,clip]},distill,trace,export]"
    report = run(project, "+clip@broken=broken", "distill.epochs=2", pipeline)
    assert report.status == "ok" and report.stages[0].key == "clip"
    assert report.stages[0].predicted_seconds > 0


def test_alternatives_that_all_fail_are(project: Path) -> None:
    pipeline = "pipeline=[distill,{first_of:[broken,other]},trace,export]"
    said, report = refused(project, "+clip@broken=broken", "+clip@other=broken", "distill.epochs=100000", pipeline)
    assert "no alternative of first_of worked" in said and "'broken'" in said and "'other'" in said
    assert report.status == "failed"


def test_nothing_is_judged(project: Path) -> None:
    def undefined_on_few(outputs: Any, target: Any) -> torch.Tensor:
        return (outputs.argmax(1) == target).float().mean() if len(target) > 200 else torch.tensor(float("nan"))

    task = pixels()
    task.metric = optpipe.Metric(name="accuracy of many", compute=undefined_on_few)
    report = run(project, "quantize=mixed", "distill.epochs=1", "pipeline=[distill,quantize,trace,export]", task=task)
    assert report.status == "ok" and report.rehearsal_seconds > 0


def test_the_plan_says_whether_there_will_be_one(optpipe: Any) -> None:
    words = ("+recipe=edge_int8", "dry_run=true")
    assert "rehearsal: the whole chain on two batches" in optpipe(*words).out
    assert "rehearsal: none, as asked" in optpipe(*words, "rehearse=false").out
    assert "rehearsal: none, no stage trains" in optpipe(*words, "pipeline=[quantize,trace,export]").out
    assert "rehearse is 'maybe'; it must be auto, true or false" in optpipe(*words, "rehearse=maybe").err

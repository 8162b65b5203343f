"""The loop: what it does with a stage's result, with alternatives and with the budget. Nothing is timed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optpipe
from optpipe.artifact import Artifact
from optpipe.forms import ExportedFile
from optpipe.forms import program as program_form
from optpipe.report.console import missing

QUICK = ("target.instruction_set=neon", "tracking=none", "measure.previews=false")
PREVIEWS = "measure.previews=true"
BROKEN = "+clip@broken=broken"


def run(project: Path, *overrides: str) -> Any:
    return optpipe.optimize(
        recipe="clip_int8", overrides=[*QUICK, *overrides], config_dir="my_conf", output=project / "run"
    ).report


def refused(project: Path, *overrides: str) -> str:
    with pytest.raises(optpipe.StageError) as error:
        run(project, *overrides)
    return str(error.value)


def test_a_stage_that_changed_nothing_says_so(project: Path) -> None:
    report = run(project, "clip.limit=1000", "pipeline=[simplify,clip,trace]")
    assert [stage.status for stage in report.stages] == ["ok", "unchanged", "ok"]
    assert report.stages[1].measurement == report.stages[0].measurement


def test_what_cannot_be_timed_here_says_why(project: Path) -> None:
    report = run(project, PREVIEWS, "pipeline=[quantize,trace,export]")
    (said,) = missing(report)
    assert said.startswith("baseline, quantize, trace, export: latency not measured: the target's instruction set")
    for stage in report.stages:
        assert "instruction set is neon" in stage.measurement.latency.not_measured
        assert stage.measurement.size_bytes > stage.measurement.compressed_bytes > 0
    assert "s8s8: chosen for neon" in " ".join(report.stages[0].notes)


def test_steps_before_the_export_have_the_size_of_a_preview(project: Path) -> None:
    trace, export = run(project, PREVIEWS, "pipeline=[quantize,trace,export]").stages[1:]
    assert trace.measurement.size_bytes == export.measurement.size_bytes
    assert export.measurement.size_bytes == (project / "run" / "model" / "model.onnx").stat().st_size


def test_first_of_takes_the_first_that_works_and_keeps_the_reasons(project: Path) -> None:
    report = run(project, BROKEN, "pipeline=[{first_of:[broken,clip,quantize]},trace]")
    stage = report.stages[0]
    assert stage.key == "clip"
    assert [(attempt.method, attempt.ok) for attempt in stage.attempts] == [("broken", False), ("clip", True)]
    assert "raised KeyError" in stage.attempts[0].reason


def test_best_of_tries_them_all_each_on_a_model_of_its_own(project: Path) -> None:
    report = run(
        project,
        PREVIEWS,
        "clip.limit=0.01",
        "pipeline=[{best_of:[[clip,quantize],quantize]},trace]",
        "budget.quality_drop=0.05",
    )
    stage = report.stages[0]
    assert [attempt.ok for attempt in stage.attempts] == [False, True]
    assert "quality_drop" in stage.attempts[0].reason
    assert [result.key for result in report.stages] == ["quantize", "trace"]
    assert report.status == "ok"


@pytest.mark.parametrize("how", ["first_of", "best_of"])
def test_alternatives_are_judged_by_every_limit(project: Path, how: str) -> None:
    limits = ("budget.quality_drop=0.9", "budget.size_bytes=9000")  # what holds in int8 only
    report = run(project, PREVIEWS, *limits, f"pipeline=[{{{how}:[clip,quantize]}},trace,export]")
    assert report.status == "ok" and report.stages[0].key == "quantize"
    clipped = report.stages[0].attempts[0]
    assert clipped.method == "clip" and "above the limit of 9000" in clipped.reason


def test_a_limit_that_no_alternative_holds_is_left_to_later_steps(project: Path) -> None:
    report = run(project, "budget.size_bytes=9000", "pipeline=[{first_of:[clip,simplify]},quantize,trace,export]")
    assert report.status == "ok" and report.stages[0].key == "clip"


def test_a_run_without_an_export_is_as_large_as_what_it_leaves(project: Path) -> None:
    report = run(project, PREVIEWS, "pipeline=[quantize,trace]")
    final, preview = report.final.measurement, report.stages[-1].measurement
    assert final.size_bytes == (project / "run" / "model" / "program.pt2").stat().st_size != preview.size_bytes


def test_no_alternative_that_works_is_an_error_with_every_reason(project: Path) -> None:
    text = refused(
        project, BROKEN, "clip.limit=0.0001", "budget.quality_drop=0.01", "pipeline=[{first_of:[broken,clip]}]"
    )
    for part in ("no alternative of first_of worked", "'broken'", "raised KeyError", "'clip': quality_drop is"):
        assert part in text


def test_a_broken_budget_is_said(project: Path) -> None:
    report = run(project, "clip.limit=0.001", "budget.quality_drop=0.01", "budget.size_bytes=10", "budget.p50_ms=1")
    assert report.status == "over_budget"
    assert len(report.budget.violations) == 3
    assert "p50_ms was not measured" in " ".join(report.budget.violations)


def test_the_policy_stop_ends_with_a_non_zero_exit_code(optpipe: Any) -> None:
    words = ("+recipe=clip_int8", "--config-dir=my_conf", *QUICK, "budget.size_bytes=10", "pipeline=[trace,export]")
    stopped = optpipe(*words, "budget.policy=stop")
    assert "over budget: size_bytes is" in stopped.err and stopped.code == 1


def test_a_sweep_runs_every_combination(optpipe: Any, project: Path) -> None:
    words = ("--multirun", "+recipe=clip_int8", "--config-dir", "my_conf", *QUICK)
    done = optpipe(*words, "clip.limit=0.5,1.0", "pipeline=[clip,trace]")
    assert done.code == 0, done.err
    assert len(list((project / "outputs" / "sweeps").glob("*/*/report.json"))) == 2


def test_a_stage_may_change_the_model_that_it_is_given(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    for number, model in enumerate((network, torch.export.export(network, (torch.ones(1, 2),)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        saved = Artifact.save(model, folder)
        with saved.lent() as given:
            given.state_dict()["weight"].zero_() if number == 0 else given.state_dict["weight"].data.zero_()
        assert saved.form.content_hash(given) != saved.form.content_hash(saved.model) == saved.hash


def test_a_stage_that_fails_leaves_no_changed_program(tmp_path: Path) -> None:
    saved = Artifact.save(torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(1, 2),)), tmp_path)
    with pytest.raises(KeyError), saved.lent() as given:
        raise KeyError
    assert saved.model is not given


def test_a_stage_may_write_to_the_file_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "theirs.onnx").write_bytes(b"a model")
    (tmp_path / "saved").mkdir()
    saved = Artifact.save(ExportedFile(tmp_path / "theirs.onnx", "onnx"), tmp_path / "saved")
    with saved.lent() as given:
        given.path.write_bytes(b"another")
    assert saved.model.path.read_bytes() == b"a model"


def test_programs_that_take_other_inputs_or_compute_something_else_are_others() -> None:
    class Mean(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.relu(image).mean((2, 3))

    def hashed(program: Any) -> str:
        return program_form.content_hash(program)

    def exported(*free: int, most: int = 64) -> Any:
        sizes = {at: torch.export.Dim(f"size{at}", min=2, max=most) for at in free}
        return torch.export.export(
            Mean(), (torch.ones(3, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO, **sizes},)
        )

    assert hashed(exported()) == hashed(exported())
    assert len({hashed(exported()), hashed(exported(2)), hashed(exported(2, 3)), hashed(exported(2, most=32))}) == 4
    without = exported()
    (relu,) = [node for node in without.graph.nodes if "relu" in node.name]
    relu.replace_all_uses_with(relu.args[0])
    without.graph.erase_node(relu)  # and nothing is compiled again
    assert hashed(without) != hashed(exported())


def test_a_program_that_no_stage_changes_is_loaded_once(tmp_path: Path) -> None:
    saved = Artifact.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path)
    with saved.lent() as given:
        pass
    assert saved.model is given

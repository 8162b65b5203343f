"""A finished run, checked and measured again in real processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from optpipe import verify


@pytest.fixture
def copied(edge_run: Any, tmp_path: Path) -> Path:
    """A copy of the session's run to damage."""
    return Path(shutil.copytree(edge_run.run, tmp_path / "run"))


def edit_report(folder: Path, change: Any) -> None:
    report = json.loads((folder / "report.json").read_text())
    change(report["final"]["measurement"])
    (folder / "report.json").write_text(json.dumps(report))


def name_in_manifest(folder: Path, name: str) -> None:
    file = folder / "model" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = manifest["files"]["model.onnx"]
    file.write_text(json.dumps(manifest))


def wide(entry: dict) -> dict:
    """A point of the grid whose intervals hold whatever a machine that is busy with other tests may measure."""
    return entry | {
        f"{name}_ci95": [entry[name] / 100, entry[name] * 100] for name in ("speedup", "speedup_same_runtime")
    }


def test_a_run_that_nobody_touched_holds(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    edit_report(copied, lambda final: final.update(latency=[wide(final["latency"][0])]))
    junit = tmp_path / "verify.xml"
    code = verify.main([str(copied), "--junit", str(junit)])
    out = capsys.readouterr().out
    assert code == 0, out
    for part in (
        "sha256 of model.onnx",
        "accuracy on 450 test samples",
        "speed-up, batch 1",
        "in the same runtime",
        "inside",
    ):
        assert part in out
    suite = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "0" and int(suite.get("tests", 0)) == len(suite) == 5


def test_a_file_that_was_changed_is_found_and_nothing_else_is_measured(
    copied: Path, capsys: pytest.CaptureFixture
) -> None:
    model = copied / "model" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"x")
    assert verify.main([str(copied)]) == 1
    out = capsys.readouterr().out
    assert "changed" in out and "accuracy" not in out


def test_a_figure_that_is_not_true_is_found(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def boast(final: dict) -> None:
        entry = wide(final["latency"][0])
        boasted = 9 * entry["speedup"]
        final["latency"] = [entry | {"speedup": boasted, "speedup_ci95": [0.9 * boasted, 1.1 * boasted]}]
        final["quality"] |= {"value": 0.5, "ci95": [0.45, 0.55]}

    edit_report(copied, boast)
    junit = tmp_path / "verify.xml"
    assert verify.main([str(copied), "--junit", str(junit)]) == 1
    failed = [case.get("name") for case in ElementTree.parse(junit).getroot() if case.find("failure") is not None]
    assert failed == ["accuracy on 450 test samples", "speed-up, batch 1, 1 thread(s)"]


def test_what_cannot_be_measured_again_does_not_hold(copied: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(copied / "00_baseline" / "exported")
    edit_report(
        copied, lambda final: final.update(latency=[wide(final["latency"][0])], quality=final["quality"] | {"n": 9})
    )
    assert verify.main([str(copied)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "not the samples of the run" in out and "the exported baseline is missing" in out


def test_figures_of_another_machine_are_not_compared(copied: Path, capsys: pytest.CaptureFixture) -> None:
    report = json.loads((copied / "report.json").read_text())
    report["environment"]["cpu"] = "Another Processor"
    (copied / "report.json").write_text(json.dumps(report))
    assert verify.main([str(copied)]) == 1
    assert "this is not where the run was measured" in " ".join(capsys.readouterr().out.split())


def test_the_gate_lets_an_equal_model_pass_and_stops_a_worse_one(edge_run: Any, tmp_path: Path) -> None:
    run = str(edge_run.run)
    assert verify.main([run, "--against", run, "--max-slowdown", "25%", "--max-drop", "0.5"]) == 0
    junit = tmp_path / "gate.xml"
    assert verify.main([run, "--against", run, "--max-slowdown=-50%", "--max-drop=-1", "--junit", str(junit)]) == 1
    failed = [case.get("name") for case in ElementTree.parse(junit).getroot() if case.find("failure") is not None]
    assert failed == ["time of a call, batch 1", "drop of accuracy on 450 test samples"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "model"), "holds no deployed model"),
        (lambda folder: (folder / "report.json").unlink(), "holds no report.json; name the folder of a run"),
        (lambda folder: (folder / "report.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "report.json").write_text('{"schema": 7}'), "is not a report of schema 1"),
        (
            lambda folder: (folder / "model" / "manifest.json").write_text("{}"),
            "it has no files, form, inputs, runtime, target",
        ),
        (lambda folder: name_in_manifest(folder, "../report.json"), "which is not in its folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "00_baseline" / "inputs_1.npz").unlink(), "without the inputs that were timed"),
    ],
)
def test_what_is_no_finished_run_is_said(copied: Path, damage: Any, words: str, capsys: pytest.CaptureFixture) -> None:
    damage(copied)
    assert verify.main([str(copied)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max-slowdown", "5%"], "name it with --against"),
        (["--junit", "no_such_folder/verify.xml"], "there is no folder no_such_folder"),
    ],
)
def test_options_that_would_do_nothing(words: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        verify.main(["somewhere", *words])
    assert error.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("share", ["slow", "5"])
def test_words_that_make_no_sense(share: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as error:
        verify.main(["somewhere", "--max-slowdown", share])
    assert error.value.code == 2 and "give 5% or 0.05" in capsys.readouterr().err

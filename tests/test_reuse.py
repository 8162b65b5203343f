"""A second run: what is the same is not computed again, what is not is, and what cannot be known says so."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import my_network
import pytest

import optpipe
from optpipe import register
from optpipe.store.__main__ import main as store_command
from optpipe.store.code import UnknownCode, code_of, value_of

PLAIN = ("target.instruction_set=neon", "tracking=none", "measure.previews=false", "rehearse=false")
PIPELINE = "pipeline=[simplify,clip,quantize,trace,export]"


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A store of this test's own."""
    return f"store.folder={tmp_path / 'store'}"


def run(project: Path, name: str, *overrides: str, fingerprint: str | None = "scikit-learn digits") -> Any:
    task = my_network.pixels()
    task.fingerprint = fingerprint
    words = [*PLAIN, PIPELINE, *overrides]
    return optpipe.optimize(
        task=task, recipe="clip_int8", overrides=words, config_dir="my_conf", output=project / name
    ).report


def computed(report: Any) -> list[str]:
    return [stage.key for stage in report.stages if not stage.cached]


def deployed(project: Path, name: str) -> bytes:
    return (project / name / "model" / "model.onnx").read_bytes()


def test_the_same_is_computed_once(project: Path, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run(project, "a", own), run(project, "b", own)
    assert computed(first) == ["simplify", "clip", "quantize", "trace", "export"] and computed(second) == []
    assert deployed(project, "a") == deployed(project, "b")
    assert second.baseline.cached and second.final.measurement.cached
    for before, after in zip(first.stages, second.stages, strict=True):
        assert (after.notes, after.facts, after.form, after.status) == (
            before.notes, before.facts, before.form, before.status,
        )  # fmt: skip
        assert after.computed_seconds == before.seconds
    changed = run(project, "c", own, "clip.limit=0.05")
    assert computed(changed) == ["clip", "quantize", "trace", "export"]
    store_command(["why", str(project / "a"), str(project / "c")])
    said = capsys.readouterr().out
    assert "step '02_clip' is the first to differ, by" in said and "settings, limit: 1.0 / 0.05" in said
    assert computed(run(project, "d", own, "seed=1"))[0] == "simplify"
    assert computed(run(project, "e", own, fingerprint="others"))[0] == "simplify"
    assert len(computed(run(project, "f", "store=none"))) == 5


def test_data_without_a_fingerprint_are_not_shared(project: Path, own: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(project, "a", own, fingerprint=None)
    assert "the task has no fingerprint, so that its data cannot be identified; nothing of this run is kept" in (
        capsys.readouterr().err
    )
    assert len(computed(run(project, "b", own, fingerprint=None))) == 5


def test_a_stage_that_cannot_be_identified_is_named(
    project: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @register("local/stage", takes="torch", gives="torch")
    @dataclasses.dataclass(kw_only=True)
    class Local:
        def run(self, model: Any, ctx: Any) -> Any:
            return model

    words = (own, "+local=stage", "pipeline=[simplify,local,quantize,trace,export]")
    run(project, "a", *words)
    assert computed(run(project, "b", *words)) == ["local"]
    said = capsys.readouterr().err
    assert "step 'local' is computed every time: class" in said and "Local is defined inside a function" in said


def test_what_was_damaged_is_computed_again(project: Path, own: str, tmp_path: Path) -> None:
    run(project, "a", own)
    for file in (tmp_path / "store" / "step").rglob("module.pt"):
        file.write_bytes(file.read_bytes()[:-1])
    second = run(project, "b", own)
    assert computed(second) == ["simplify", "clip", "quantize"]
    assert deployed(project, "a") == deployed(project, "b")


def test_a_training_that_was_killed_goes_on(project: Path, own: str, tmp_path: Path) -> None:
    words = [
        "+recipe=clip_int8", *PLAIN, "data=lasting", "distill=finetune", "distill.epochs=50", "pipeline=[distill]",
    ]  # fmt: skip
    conf = project / "my_conf" / "data"
    conf.mkdir(exist_ok=True)
    (conf / "lasting.yaml").write_text("factory: lasting.task\n")
    (project / "lasting.py").write_text(
        "import my_network\n\n\n"
        "def task():\n    task = my_network.pixels()\n    task.fingerprint = 'digits'\n    return task\n"
    )
    command = [sys.executable, "-m", "optpipe", *words, own, "--config-dir", "my_conf", "hydra.run.dir=killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial, until = tmp_path / "store" / "partial", time.monotonic() + 120
    while not list(partial.glob("*/training.ckpt")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, capture_output=True)
    notes = optpipe.report.Report.read(project / "killed").stages[0].notes
    assert any("went on after epoch" in note for note in notes)
    assert not list(partial.iterdir())
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "'killed' holds a run that is done; choose another folder" in again.stderr
    assert not list((project / "killed").glob(".optpipe*"))


def scaled(factor: float) -> Any:
    return lambda value: value * factor


def test_code_is_told_apart() -> None:
    assert code_of(scaled(1.0)) == code_of(scaled(1.0)) != code_of(scaled(2.0))
    assert code_of(optpipe.Task) != code_of(optpipe.Metric)
    assert value_of("my_network.Perceptron", "student") != value_of("my_network.Other", "student")
    with pytest.raises(UnknownCode, match=r"a setting is of type .*object, which cannot be compared"):
        value_of(object(), "a setting")


def test_a_change_in_what_a_module_imports_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text("import inner\n\ndef outer(): return inner.two()\n")
    said = "from outer import outer; from optpipe.store.code import code_of; print(code_of(outer))"
    found = []
    for body in ("def two(): return 2\n", "def two(): return 3\n"):
        (tmp_path / "inner.py").write_text(body)
        done = subprocess.run([sys.executable, "-c", said], cwd=tmp_path, capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] != found[1]

"""The reference case: a network that no tracer captures, what is said of it, and the student that takes its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optpipe import lower
from optpipe.errors import StageError
from optpipe.measure import quality
from optpipe.task import call, leaves
from optpipe.zoo import propositions
from optpipe.zoo.propositions import PROPOSITIONS, Reasoner, ResidualMLP, confidence_of, draw

TINY = {"hidden": 16, "layers": 1, "heads": 2, "slots": 4, "steps": 3}


@pytest.fixture
def reasoner() -> Reasoner:
    torch.manual_seed(0)
    return Reasoner(**TINY).eval()


@pytest.fixture
def numbers() -> torch.Tensor:
    return draw(8, 5)[0]


def test_it_thinks_until_all_of_the_batch_are_confident(reasoner, numbers) -> None:
    with torch.no_grad():
        reasoner.enough = 0.0
        assert reasoner(numbers)["depth"] == 1
        reasoner.enough = 1.0
        slow = reasoner(numbers)
    assert slow["depth"] == len(slow["chain"]) == TINY["steps"]
    assert torch.equal(slow["chain"][-1]["scores"], slow["reasoning_scores"])
    reasoner.enough = float(slow["chain"][1]["confidence"].min()) - 1e-6
    with torch.no_grad():
        assert reasoner(numbers)["depth"] <= 2
        assert reasoner.train()(numbers)["depth"] == TINY["steps"]


def test_its_return_value_mixes_tensors_with_what_no_graph_holds(reasoner, numbers) -> None:
    kinds = {type(leaf) for _, leaf in leaves(reasoner(numbers))}
    assert {torch.Tensor, int, str} <= kinds
    assert list(propositions.task(train=64).selected(reasoner(numbers))) == propositions.OUTPUTS


def test_tracing_fails_as_users_report(reasoner, numbers) -> None:
    with pytest.raises(RuntimeError, match="Tracer cannot infer type of"), pytest.warns():
        torch.jit.trace(reasoner, numbers)
    with pytest.raises(StageError, match="cannot capture this model"):
        lower.trace(reasoner, propositions.task(train=64))


def test_the_student_gives_the_same_outputs_and_is_captured(reasoner, numbers) -> None:
    task, student = propositions.task(train=64), ResidualMLP(16, 1)
    program = lower.trace(student, task)
    for size in (1, 5):
        mine, its = (task.selected(call(model, numbers[:size])) for model in (program.module(), reasoner))
        assert {name: part.shape for name, part in mine.items()} == {name: part.shape for name, part in its.items()}
        assert torch.equal(mine["confidence"], confidence_of(mine["reasoning_scores"]))
    assert sum(weight.numel() for weight in ResidualMLP().parameters()) == pytest.approx(0.93e6, rel=0.01)


def test_quality_is_told_of_every_proposition(reasoner) -> None:
    task = propositions.task(train=64)
    predicted = task.predict(reasoner, "test")
    assert predicted.num_labels == len(PROPOSITIONS)
    summary = quality.summary(predicted, predicted, task.class_names)
    assert [group.label for group in summary.groups] == list(PROPOSITIONS)
    assert sum(group.value for group in summary.groups) / len(PROPOSITIONS) == pytest.approx(summary.value)


def test_the_recipe_says_what_failed_and_what_replaced_it(tmp_path: Path, cache: Path) -> None:
    words = [
        "+recipe=reasoner", "model.factory=optpipe.zoo.propositions.Reasoner", "+data.args.train=1024",
        *(f"+model.args.{name}={value}" for name, value in TINY.items()),
        "distill.student_args={width: 32, blocks: 1}", "distill.epochs=1",
        "recover.epochs=1", "measure=quick", "measure.noise_limit=1000", "target.batch_sizes=[1]",
        "benchmark.callers=[1]", "budget.quality_drop=1", "tracking=none", "rehearse=false",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "optpipe", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    report = json.loads((run / "report.json").read_text())
    assert [stage["key"] for stage in report["stages"] if stage["status"] == "ok"][1:] == [
        "distill", "prune", "recover", "quantize", "trace", "export", "benchmark",
    ]  # fmt: skip
    (attempts,) = (stage["attempts"] for stage in report["stages"] if stage["key"] == "distill")
    exported, scripted, taken = attempts
    assert exported["method"] == "trace_original+export_original" and not exported["ok"]
    assert "torch.export, strict" in exported["reason"] and "confidence.min().item()" in exported["reason"]
    assert scripted["method"] == "script_original+export_script" and not scripted["ok"]
    assert all(way in scripted["reason"] for way in ("torch.jit.trace", "torch.jit.script", "strict=False"))
    assert taken["method"] == "distill+prune+recover+quantize+trace+export" and taken["chosen"]
    assert any("ResidualMLP" in note for stage in report["stages"] for note in stage["notes"])
    manifest = json.loads((run / "model" / "manifest.json").read_text())
    assert [output["name"] for output in manifest["outputs"]] == propositions.OUTPUTS

"""best_of: alternatives that compete with one another and with the model before them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import reports
from test_pipeline import BROKEN, PREVIEWS, refused, run

from optpipe import contest
from optpipe.budget import Estimate
from optpipe.contest import Entrant
from optpipe.metrics import mean_absolute_error, top1_accuracy
from optpipe.report import NotMeasured, Report
from optpipe.report.console import tried

AGAIN = "+clip@again=weights"
SPOILT = "clip.limit=0.001"  # all weights nearly alike: digits by chance
LIMIT = "budget.quality_drop=0.05"
MARGIN = 0.02
HERE = ("target.instruction_set=host", "measure.explain=false", "measure.noise_limit=1000", "measure.replicas=2")
HERE += ("measure.max_seconds=0.3", "measure.rounds=2")


def entrant(speedup: float = 2.0, half: float = 0.1, size: int = 1000, drop: float = 0.0, *broken: str) -> Entrant:
    """Against an input that is 2 times as fast as the unoptimised model, within 0.1."""
    ends = (speedup - half, speedup + half)
    latency = reports.latency(speedup_same_runtime=speedup, speedup_same_runtime_ci95=ends, p50_ms=1 / speedup)
    estimate = Estimate(drop, (drop - 0.01, drop + 0.01), lambda confidence: drop)
    measurement = reports.measurement(latency=[latency], size_bytes=size)
    said = {name: f"{name} is broken" for name in broken}
    return Entrant(measurement=measurement, metric=top1_accuracy(), drop=estimate, broken=said)


def untimed(one: Entrant, **changed: Any) -> Entrant:
    nothing = NotMeasured("no such machine")
    return dataclasses.replace(one, measurement=dataclasses.replace(one.measurement, latency=nothing, **changed))


def why_not(one: Entrant, before: Entrant, gains: bool = False) -> str:
    return contest.shortcoming(one, before, MARGIN, lambda: gains)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (entrant(2.5), ""),
        (entrant(2.5, size=4000), ""),  # faster and larger
        (entrant(2.0, size=500), ""),
        (entrant(2.15, 0.1), "no faster than the model before it, and no smaller"),  # the intervals overlap
        (entrant(2.03, 0.001), "no faster"),  # told apart by nothing that matters
        (entrant(1.5, size=500), "slower than the model before it, and smaller"),
        (entrant(2.0, size=990), "and no smaller"),  # inside the margin
        (entrant(3.0, 0.1, 500, 0.0, "p50_ms"), "it breaks a limit that the model before it holds"),
        (untimed(entrant(size=500)), ""),
        (untimed(entrant(size=1000)), "not timed beside the model before it, and no smaller"),
        (untimed(entrant(), size_bytes=NotMeasured("no file")), "not timed beside"),
    ],
)
def test_what_is_better_than_the_model_before(one: Entrant, words: str) -> None:
    said = why_not(one, entrant(2.0, half=0.1))
    assert words in said and bool(words) == bool(said)


def test_a_limit_that_holds_again_or_quality_that_is_regained_counts() -> None:
    pruned = entrant(2.0, 0.1, 1000, 0.8, "quality_drop")
    assert why_not(entrant(2.0, drop=0.01), pruned) == ""
    assert why_not(entrant(2.0, 0.1, 1000, 0.2, "quality_drop"), pruned, gains=True) == ""
    assert "no faster" in why_not(entrant(2.0, 0.1, 1000, 0.8, "quality_drop"), pruned)
    assert "slower" in why_not(entrant(1.0), entrant(2.0), gains=True)


def test_the_best_is_fastest_then_smallest_then_first() -> None:
    fast, small, tied = entrant(3.0), entrant(2.9, size=500), entrant(2.95)
    assert contest.best([entrant(2.0), fast], MARGIN) is fast
    assert contest.best([fast, small], MARGIN) is small  # not told apart in speed
    assert contest.best([tied, fast], MARGIN) is tied
    assert contest.best([tied, entrant(4.0, 0.1, 1000, 0.0, "size_bytes")], MARGIN) is tied  # inside the budget first
    assert contest.best([entrant(3.0, drop=0.02), better := entrant(3.0, drop=0.01)], MARGIN) is better
    assert contest.best([untimed(fast), tied], MARGIN) is tied
    assert contest.best([untimed(fast), light := untimed(small)], MARGIN) is light
    lost = [entrant(9.0, 0.1, 10, 0.5, "quality_drop"), entrant(2.0, 0.1, 1000, 0.1, "quality_drop")]
    assert contest.best(lost, MARGIN) is lost[1]


def test_figures_read_as_a_sentence() -> None:
    said = entrant(2.1, 0.1, 1_399_000, 0.002).said()
    assert (
        said == "0.476 ms, 2.10 × [2.00, 2.20] in the same runtime, 1.40 MB, −0.20 points [−1.20, +0.80] on validation"
    )
    error = dataclasses.replace(entrant(drop=0.002), metric=mean_absolute_error())
    assert "+0.002 " in error.said() and "[-" not in error.said()
    assert untimed(entrant()).said().startswith("latency not measured, 1.00 KB")


def test_where_nothing_helps_the_model_before_goes_on(project: Path) -> None:
    report = run(
        project, PREVIEWS, BROKEN, AGAIN, SPOILT, "again.limit=0.3", LIMIT, "budget.policy=stop",
        "pipeline=[{best_of: [broken,clip,again]},trace]",
    )  # fmt: skip
    choice, *others = report.stages
    assert report.status == "ok" and [result.key for result in others] == ["trace"]
    assert (choice.key, choice.stage, choice.status) == ("best_of_broken_clip_again", "best_of", "unchanged")
    assert choice.measurement == report.baseline
    broken, spoilt, useless = choice.attempts
    assert not any(attempt.ok or attempt.chosen for attempt in choice.attempts)
    assert "raised KeyError" in broken.reason and isinstance(broken.size_bytes, NotMeasured)
    assert "quality_drop is" in spoilt.reason and "points [" in spoilt.reason
    assert spoilt.quality_drop > spoilt.quality_drop_ci95[0] > 0.05 and spoilt.size_bytes > 0
    assert "not timed beside the model before it, and no smaller" in useless.reason
    assert "which goes on: latency not measured" in choice.notes[0]
    assert Report.read(project / "run") == report
    assert report.overhead_seconds < report.seconds
    page = (project / "run" / "report.html").read_text()
    assert "✗ refused" in page and "no smaller" in page and "= unchanged" in page
    assert "best_of_broken_clip_again: 3 alternatives were tried" in tried(report)


def test_a_branch_that_changed_nothing_is_refused(project: Path) -> None:
    report = run(project, PREVIEWS, AGAIN, "clip.limit=100", "again.limit=200", "pipeline=[{best_of: [clip,again]}]")
    assert report.stages[0].status == "unchanged"
    assert all(attempt.reason.startswith("it changed nothing") for attempt in report.stages[0].attempts)


def test_the_smaller_file_wins_and_the_others_stay_as_attempts(project: Path) -> None:
    report = run(project, PREVIEWS, LIMIT, "clip.limit=0.3", "pipeline=[{best_of: [clip,quantize]}]")
    chosen = report.stages[0]
    assert chosen.key == "quantize" and chosen.status == "ok"
    assert [(attempt.ok, attempt.chosen) for attempt in chosen.attempts] == [(False, False), (True, True)]
    sizes = [attempt.size_bytes for attempt in chosen.attempts]
    assert sizes[1] < sizes[0] and "chosen by best_of; the model before it: " in " ".join(chosen.notes)


def test_quality_that_is_regained_is_not_given_up(project: Path) -> None:
    words = ("+distill@train=finetune", "+distill@train_more=finetune", "train.epochs=1", "train_more.epochs=4")
    report = run(project, PREVIEWS, LIMIT, SPOILT, *words, "pipeline=[clip,{best_of: [train,train_more]}]")
    assert report.stages[1].key in ("train", "train_more")
    before, after = (stage.measurement.quality.value for stage in report.stages[:2])
    assert after > before + 0.2


def test_alternatives_that_change_the_form_cannot_be_left_out(project: Path) -> None:
    branches = "pipeline=[{best_of: [[broken,trace],[clip,trace_again]]},export]"
    words = (PREVIEWS, BROKEN, "+trace@trace_again=program", SPOILT, LIMIT, "budget.policy=rollback", branches)
    said = refused(project, *words)
    for part in (
        "no alternative of best_of worked",
        "raised KeyError",
        "quality_drop is",
        "cannot go on in their place",
    ):
        assert part in said
    assert "they turn a torch module into an exported program" in said


def in_engine(name: str, small: float, large: float, half: float = 0.1, drop: float = 0.0) -> Entrant:
    """How many times faster than it came in at batch 1, within `half`, and at batch 16."""
    one, ends = entrant(drop=drop), (small - half, small + half)
    grid = [reports.latency(runtime=name, speedup=small, speedup_same_runtime=small, speedup_ci95=ends)]
    grid.append(dataclasses.replace(grid[0], batch_size=16, speedup=large))
    return dataclasses.replace(one, measurement=dataclasses.replace(one.measurement, latency=grid))


def test_engines_rank_by_batch_1_then_by_all_batch_sizes_then_by_quality() -> None:
    first = in_engine("onnxruntime", 6.0, 6.0)
    assert contest.best_engine([first, in_engine("openvino", 7.0, 1.0)], MARGIN).runtime == "openvino"
    assert contest.best_engine([first, in_engine("openvino", 6.1, 9.0)], MARGIN).runtime == "openvino"
    assert contest.best_engine([first, in_engine("openvino", 5.9, 9.0)], MARGIN).runtime == "openvino"
    assert contest.best_engine([first, in_engine("openvino", 6.0, 6.1)], MARGIN).runtime == "onnxruntime"
    assert contest.best_engine([first, in_engine("openvino", 6.0, 6.1, drop=-0.01)], MARGIN).runtime == "openvino"


def test_the_engines_gain_is_not_taken_for_the_branchs(project: Path) -> None:
    """Clipping changes no time; the model before it is timed in the target's runtime too, not in eager PyTorch."""
    report = run(project, PREVIEWS, *HERE, BROKEN, "clip.limit=0.3", "pipeline=[{best_of: [clip,broken]}]")
    clip = report.stages[0].attempts[0]
    assert clip.latency.runtime == "onnxruntime" and " ms, " in clip.reason and "in the same runtime" in clip.reason
    assert clip.latency.speedup > 1.5  # against eager
    assert clip.latency.speedup_same_runtime_ci95[0] < 1.2

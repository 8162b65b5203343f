"""Limits, how they are judged, and what each policy does where a step breaks one. Nothing is timed here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import PREVIEWS, run

import optpipe
from optpipe.budget import Budget, Estimate, Policy, estimates, judge
from optpipe.report import Latency, Measurement, NotMeasured, Report

SPOILS = (
    "clip.limit=0.001",
    "budget.quality_drop=0.05",
    "measure.previews=false",
)  # all weights nearly alike: digits by chance
RELAX = "relax={clip: [{limit: 0.002}, {limit: 2.0}]}"
PIPELINE = "pipeline=[simplify,clip,quantize,trace,export]"


LATENCY = Latency(
    runtime="onnxruntime", batch_size=1, threads=1, p50_ms=1.0, p95_ms=1.1, p99_ms=1.2, std_ms=0.1, throughput=990.0,
    speedup=2.0, speedup_ci95=(1.9, 2.1), speedup_same_runtime=1.5, speedup_same_runtime_ci95=(1.4, 1.6),
    verdict="faster", verdict_same_runtime="faster", calls=900, replicas=5, load_ms=5.0, first_call_ms=3.0,
    replica_p50_ms=[0.99, 1.0, 1.01, 1.02, 0.98], replica_speedups=[1.98, 2.0, 2.02, 2.04, 1.96],
    replica_speedups_same_runtime=[1.5, 1.51, 1.49, 1.5, 1.5],
)  # fmt: skip
MEASUREMENT = Measurement(
    size_bytes=1000, quality=NotMeasured("not here"), latency=[LATENCY], peak_memory_bytes=1000
)  # fmt: skip


def statuses(report: Report) -> dict[str, str]:
    return {stage.key: stage.status for stage in report.stages}


def test_warn_goes_on_and_says_so(project: Path) -> None:
    report = run(project, *SPOILS, PIPELINE)
    assert report.status == "over_budget"
    assert set(statuses(report).values()) == {"ok"}
    (violation,) = report.budget.violations
    assert "quality_drop is" in violation and "points on validation, above the limit of 5" in violation


def test_stop_ends_at_the_step_that_broke_it(project: Path) -> None:
    with pytest.raises(optpipe.StageError, match=r"over budget after step 'clip', and budget.policy is stop"):
        run(project, *SPOILS, "budget.policy=stop", PIPELINE)
    report = Report.read(project / "run")
    assert report.status == "over_budget" and list(statuses(report)) == ["simplify", "clip"]
    assert isinstance(report.final, NotMeasured)


def test_rollback_drops_the_step_and_ends_inside_the_budget(project: Path) -> None:
    report = run(project, *SPOILS, "budget.policy=rollback", PIPELINE)
    assert report.status == "ok" and not report.budget.violations
    assert statuses(report) == {
        "simplify": "ok",
        "clip": "rolled_back",
        "quantize": "ok",
        "trace": "ok",
        "export": "ok",
    }
    assert "rolled back: quality_drop is" in report.stages[1].notes[-1]
    last = report.budget.checks[-1]
    assert last.where == "run" and last.holds and last.value <= 0.05


def test_rollback_goes_on_where_no_alternative_holds(project: Path) -> None:
    again = (
        "+clip@again=weights",
        "again.limit=0.0001",
        "pipeline=[simplify,{first_of: [clip,again]},quantize,trace,export]",
    )
    report = run(project, *SPOILS, *again, "budget.policy=rollback")
    assert report.status == "ok"
    assert [stage.status for stage in report.stages] == ["ok", "rolled_back", "rolled_back", "ok", "ok", "ok"]
    assert [attempt.ok for attempt in report.stages[1].attempts] == [False, False]


def test_relax_tries_what_the_recipe_lists_and_keeps_every_try(project: Path) -> None:
    report = run(project, *SPOILS, "budget.policy=relax", RELAX, PIPELINE)
    assert report.status == "ok"
    clip = report.stages[1]
    assert [(attempt.method, attempt.ok) for attempt in clip.attempts] == [
        ("limit=0.001", False), ("limit=0.002", False), ("limit=2.0", True),
    ]  # fmt: skip
    assert all("quality_drop is" in attempt.reason for attempt in clip.attempts[:2])
    assert statuses(report) == dict.fromkeys(["simplify", "clip", "quantize", "trace", "export"], "ok") | {
        "clip": clip.status
    }


def test_relax_rolls_back_where_nothing_milder_helps(project: Path) -> None:
    report = run(project, *SPOILS, "budget.policy=relax", "relax={clip: [{limit: 0.002}]}", PIPELINE)
    assert report.status == "ok" and statuses(report)["clip"] == "rolled_back"
    assert [attempt.ok for attempt in report.stages[1].attempts] == [False, False]


def test_relax_goes_back_past_steps_that_have_nothing_milder(project: Path) -> None:
    words = (
        "clip.limit=0.001",
        "measure.previews=false",
        "+budget.stages.quantize.quality_drop=0.05",
        "budget.policy=relax",
    )
    report = run(project, *words, "relax={clip: [{limit: 2.0}]}", PIPELINE)
    assert report.status == "ok"
    assert [attempt.ok for attempt in report.stages[1].attempts] == [False, True]


def test_a_limit_of_one_step(project: Path) -> None:
    report = run(project, PREVIEWS, "+budget.stages.trace.size_bytes=10", "budget.policy=rollback", PIPELINE)
    assert report.status == "over_budget"  # a program cannot be rolled back to a module: export needs it
    (violation,) = report.budget.violations
    assert violation.startswith("after 'trace', size_bytes is")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quality_drop": -0.1}, "quality_drop is -0.1"),
        ({"p50_ms": 0}, "p50_ms is 0; it must be above 0"),
        ({"speedup": float("nan")}, "speedup is nan"),
        ({"confidence": 0.3}, "confidence is 0.3; it must be at least 0.5 and below 1"),
        ({"policy": Policy.rollback}, "policy is rollback, but there is no limit"),
        ({"stages": {"prune": {}}}, "stages.prune sets no limit"),
        ({"stages": {"prune": {"p50": 1.0}}}, "stages.prune has no limit 'p50'; did you mean 'p50_ms'"),
        ({"stages": {"prune": 0.1}}, "stages.prune is 0.1; it must name limits"),
        ({"stages": {"prune": {"p50_ms": "fast"}}}, "stages.prune: p50_ms is 'fast'; it must be a number"),
    ],
)
def test_settings_that_are_wrong_in_themselves(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Budget(**settings)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+budget.stages.prun.quality_drop=0.1"], ["budget.stages.prun", "did you mean 'prune'"]),
        (
            ["budget.quality_drop=0.01", "+budget.stages.quantize.quality_drop=0.1"],
            ["budget.stages.quantize.quality_drop=0.1 contradicts budget.quality_drop=0.01"],
        ),
        (["measure=quick", "+budget.stages.prune.size_bytes=9"], ["measure.previews=false leaves unmeasured"]),
        (["budget.quality_drop=0.01", "budget.policy=relax"], ["relax lists no milder settings"]),
        (["budget.stages={quantize: {speedup: 2}}"], ["one step at a time", "+budget.stages.quantize="]),
        (["budget.stages.quantize={speedup: 2}"], ["add it as '+budget.stages.quantize"]),
        (["budget.p50_ms=1", "pipeline=[simplify,quantize]"], ["the pipeline ends with a torch module", "an export"]),
        (
            ["measure=quick", "pipeline=[{best_of: [simplify,quantize]},trace,export]"],
            ["takes the fastest, which measure.previews=false leaves unmeasured"],
        ),
        (["pipeline=[{best_of: [[],quantize]},trace,export]"], ["best_of holds an empty alternative"]),
        (
            ["pipeline=[{first_of: [prune,distill]},trace,export]", "relax={prune: [{ratio: 0.1}]}"],
            ["relax names 'prune'", "inside an alternative cannot be relaxed"],
        ),
        (["relax={prun: [{ratio: 0.1}]}"], ["relax names 'prun'", "did you mean 'prune'"]),
        (["relax={prune: {ratio: 0.1}}"], ["relax.prune is {'ratio': 0.1}; it must list settings"]),
        (["relax={prune: [{rato: 0.1}]}"], ["relax.prune", "rato"]),
        (["relax={prune: [{ratio: 7}]}"], ["relax.prune", "ratio is 7"]),
    ],
)
def test_limits_that_contradict_the_recipe(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(optpipe.RecipeError) as error:
        optpipe.optimize(recipe="edge_int8", overrides=["tracking=none", *overrides])
    for word in words:
        assert word in str(error.value)


def test_too_few_samples_for_the_confidence_are_refused_with_the_number_needed(project: Path) -> None:
    with pytest.raises(optpipe.RecipeError) as error:
        run(project, "budget.quality_drop=0.0001", "budget.confidence=0.95", "pipeline=[trace]")
    assert "confidence=0.95 cannot be shown to hold" in str(error.value) and "give at least" in str(error.value)


def test_a_limit_holds_with_the_confidence_that_was_asked_for() -> None:
    measurement = dataclasses.replace(MEASUREMENT, latency=[LATENCY])
    known = estimates(measurement, MEASUREMENT)
    p50, speedup = known["p50_ms"], known["speedup"]
    assert isinstance(p50, Estimate) and isinstance(speedup, Estimate)
    assert p50.bound(0.5) == LATENCY.p50_ms < p50.bound(0.95) < p50.bound(0.99)
    assert speedup.bound(0.5) == LATENCY.speedup > speedup.bound(0.95)
    limit = {"p50_ms": LATENCY.p50_ms * 1.001}
    (bold,), (careful,) = judge(limit, known, 0.5, "run"), judge(limit, known, 0.95, "run")
    assert bold.holds and not careful.holds
    assert bold.undecided and careful.undecided
    assert "undecided" in bold.said and "with confidence 0.95 at most" in careful.said


def test_limits_relative_to_the_baseline() -> None:
    half = dataclasses.replace(MEASUREMENT, size_bytes=500, peak_memory_bytes=900)
    known = estimates(half, dataclasses.replace(MEASUREMENT, size_bytes=1000, peak_memory_bytes=1000))
    checks = judge({"size_ratio": 0.5, "memory_ratio": 0.5, "speedup": 2.0}, known, 0.5, "run")
    assert [check.holds for check in checks] == [True, False, LATENCY.speedup >= 2.0]
    assert "above the limit" in checks[1].said


def test_a_limit_on_what_was_not_measured_does_not_hold() -> None:
    unknown = dataclasses.replace(
        MEASUREMENT, latency=NotMeasured("no such machine"), size_bytes=NotMeasured("no file")
    )
    for check in judge({"p50_ms": 1.0, "size_ratio": 1.0}, estimates(unknown, MEASUREMENT), 0.5, "run"):
        assert not check.holds and "was not measured (no" in check.said

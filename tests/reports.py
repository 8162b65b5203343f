"""Reports as a run may write them: with every part, and with none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from optpipe.report import (
    Attempt,
    BudgetReport,
    Callers,
    Check,
    Final,
    Finding,
    Group,
    Latency,
    Measurement,
    NotMeasured,
    Operator,
    Quality,
    Report,
    Roofline,
    StageResult,
    Sustained,
    Table,
)

ENVIRONMENT = {
    "cpu": "Some CPU",
    "isa": ["avx2", "fma"],
    "cores": 4,
    "versions": {"torch": "2.13.0", "onnxruntime": "1.31.0"},
}


def latency(**changed: Any) -> Latency:
    """Of a model that is 4 times as fast as it came in."""
    figures: dict[str, Any] = {
        "runtime": "onnxruntime", "batch_size": 1, "threads": 1, "p50_ms": 0.5, "p95_ms": 0.6, "p99_ms": 0.7,
        "std_ms": 0.05, "throughput": 1980.0, "speedup": 4.0, "speedup_ci95": (3.9, 4.1), "speedup_same_runtime": 2.0,
        "speedup_same_runtime_ci95": (1.9, 2.1), "verdict": "faster", "verdict_same_runtime": "faster", "calls": 4321,
        "replicas": 5, "load_ms": 12.5, "first_call_ms": 3.25, "quantiles_ms": [0.4 + 0.01 * i for i in range(21)],
    }  # fmt: skip
    return Latency(**{**figures, **changed})


def quality(**changed: Any) -> Quality:
    figures: dict[str, Any] = {
        "metric": "accuracy", "value": 0.95, "ci95": (0.93, 0.97), "n": 400, "delta": -0.01, "delta_ci95": (-0.02, 0.0)
    }  # fmt: skip
    return Quality(**{**figures, **changed})


def measurement(**changed: Any) -> Measurement:
    figures = {"size_bytes": 25_000, "quality": quality(), "latency": [latency()], "peak_memory_bytes": 60_000_000}
    return Measurement(**{**figures, **changed})


def baseline() -> Measurement:
    eager = latency(runtime="torch", p50_ms=2.0, speedup=1.0, speedup_ci95=(0.99, 1.01), verdict="same")
    exported = latency(p50_ms=1.0, speedup=2.0, speedup_ci95=(1.9, 2.1))
    return measurement(size_bytes=100_000, quality=quality(value=0.96, delta=0.0), latency=[eager, exported])


def full() -> Report:
    """Every optional part is there."""
    nothing = NotMeasured("3 samples are too few")
    groups = [
        Group(by="class", label="cat", n=40, value=0.9, ci95=(0.8, 0.95), delta=-0.05, delta_ci95=(-0.1, 0.02)),
        Group(by="light", label="night", n=3, value=nothing, ci95=nothing, delta=nothing, delta_ci95=nothing),
    ]
    last = measurement(
        quality=quality(gained=3, lost=7, mcnemar_p=0.34, groups=groups, notes=["one point is four samples"]),
        latency=[
            latency(),
            latency(batch_size=8, p50_ms=3.75, speedup=0.8, speedup_ci95=(0.78, 0.82), verdict="slower"),
        ],
        energy_joules=0.0042,
        callers=[Callers(callers=2, throughput=3456.0, p50_ms=0.55, p95_ms=0.9)],
        sustained=Sustained(seconds=60.0, p50_ms=[0.5, 0.5, 0.51, 0.52, 0.55, 0.56], drift=1.12),
        findings=[
            Finding(cause="call_overhead", share=0.31, evidence="an empty graph takes 0.15 ms", remedy="big batches"),
            Finding(cause="float_operators", share=nothing, evidence="2 Softmax in float", remedy="leave them"),
        ],
        roofline=Roofline(
            operations=5_600_000, bytes=410_000, compute_ms=0.3, memory_ms=0.1, overhead_ms=0.2, p50_ms=0.5,
            share_of_limit=0.6, binds="compute",
        ),
        operators=[
            Operator(name="/conv1/Conv_quant", kind="QLinearConv", ms=0.3, share=0.6, operations=5_000_000, bytes=9000),
            Operator(name="/softmax", kind="Softmax", ms=0.2, share=0.4),
        ],
    )  # fmt: skip
    stages = [
        StageResult(
            key="prune", stage="prune/channels", status="ok", seconds=1.5, form="torch", measurement=measurement()
        ),
        StageResult(
            key="prune_more", stage="prune/channels", status="rolled_back", seconds=2.5, form="torch",
            measurement=measurement(size_bytes=9_000), notes=["quality_drop was 3.00 points"],
        ),
        StageResult(
            key="quantize", stage="quantize/static", status="ok", seconds=0.5, form="onnx", measurement=last,
            facts={"scheme": "u8s8", "losses": [0.5, 0.25]}, cached=True,
            attempts=[
                Attempt(method="dynamic", ok=False, reason="no linear layer"),
                Attempt(method="static", ok=True, reason="0.500 ms"),
            ],
            tables=[
                Table(
                    title="Every layer alone", columns=["layer", "kind", "SQNR, dB", "noise", "Δ²/12"],
                    rows=[
                        ["conv1", "Conv2d", 31.44, 2.5e-6, 2.25e-6],
                        ["head <b>", "Linear", float("inf"), 0.125, None],
                    ],
                    chart=["SQNR, dB", ["noise", "Δ²/12"]], note="Low is bad.",
                ),
            ],
        ),
        StageResult(
            key="tidy", stage="simplify/standard", status="unchanged", seconds=0.1, form="onnx", measurement=last
        ),
    ]  # fmt: skip
    budget = BudgetReport(
        limits={"quality_drop": 0.02},
        policy="rollback",
        confidence=0.95,
        checks=[
            Check(
                where="prune_more", limit="quality_drop", allowed=0.02, value=0.03, bound=0.04, holds=False,
                undecided=True, said="quality_drop is 3.00 points, above 2.00",
            )
        ],
    )  # fmt: skip
    return Report(
        recipe="mine", overrides=["+recipe=mine", "prune.ratio=0.3"], environment=ENVIRONMENT, budget=budget,
        status="ok", command="python -m optpipe +recipe=mine prune.ratio=0.3", data_fingerprint="pets 1",
        baseline=baseline(), stages=stages, final=Final(artifact="model/model.onnx", measurement=last), seconds=12.0,
    )  # fmt: skip


def of(final: Measurement, status: str) -> Report:
    """A run that came to `final`."""
    return replace(full(), status=status, final=Final(artifact="model/model.onnx", measurement=final))


def empty() -> Report:
    """A run that was given up, of a model that could not be measured."""
    nothing = NotMeasured("no instrument")
    unknown = Measurement(size_bytes=nothing, quality=nothing, latency=nothing, peak_memory_bytes=nothing)
    stage = StageResult(
        key="prune", stage="prune/channels", status="ok", seconds=0.0, form="torch", measurement=unknown
    )
    broken = replace(stage, key="export", stage="export/onnx", status="failed", measurement=NotMeasured("it failed"))
    return Report(
        recipe="", overrides=[], environment={}, budget=BudgetReport(limits={}, policy="warn"), status="failed",
        baseline=unknown, stages=[stage, broken], error="stage 'export/onnx' raised KeyError",
    )  # fmt: skip


def write_run(folder: Path, report: Report, eager_ms: float = 2.0, final_ms: float = 0.5, seed: int = 0) -> Path:
    """A run's folder with the times of the final model's calls: 5 replicas that differ by about 1 %."""
    rng = np.random.default_rng(seed)
    replica = np.repeat(np.arange(5), 200)
    arrays = {}
    for name, centre in (("subject", final_ms), ("eager", eager_ms), ("exported", eager_ms / 2)):
        arrays[name] = centre * (1 + 0.01 * rng.standard_normal(5))[replica] * np.exp(0.05 * rng.standard_normal(1000))
        arrays[f"{name}_replica"] = replica
    (folder / "samples").mkdir(parents=True)
    np.savez(folder / "samples" / "last_b1.npz", **arrays)
    assert isinstance(report.final, Final) and isinstance(report.final.measurement.latency, list)
    first, *others = report.final.measurement.latency
    timed = replace(report.final.measurement, latency=[replace(first, samples="samples/last_b1.npz"), *others])
    replace(report, final=replace(report.final, measurement=timed)).write(folder)
    return folder


def write_scores(folder: Path, scores: Any) -> None:
    (folder / "quality").mkdir()
    np.savez(folder / "quality" / "final.npz", scores=np.asarray(scores, float))

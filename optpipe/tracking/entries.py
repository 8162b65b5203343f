"""What a run's results are called in MLflow."""

from __future__ import annotations

import math
import re
from typing import Any

from optpipe.report import Measurement, NotMeasured

PARAM_LIMIT = 500  # characters of a value; the whole configuration is in the artifact config.json
NAME_LIMIT = 250
FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in MLflow's names


def metrics(measurement: Measurement | NotMeasured) -> dict[str, float]:
    """Every figure that was measured, by a short name."""
    if isinstance(measurement, NotMeasured):
        return {}
    found: dict[str, float] = {}
    for name in ("size_bytes", "compressed_bytes", "peak_memory_bytes"):
        if not isinstance(value := getattr(measurement, name), NotMeasured):
            found[name] = value
    if not isinstance(quality := measurement.quality, NotMeasured):
        found |= {"quality": quality.value, "quality_delta": quality.delta}
    if latency := measurement.headline():
        found |= {name: getattr(latency, name) for name in ("p50_ms", "p95_ms", "std_ms", "throughput", "speedup")}
        if not isinstance(latency.speedup_same_runtime, NotMeasured):
            found["speedup_same_runtime"] = latency.speedup_same_runtime
    if not isinstance(measurement.latency, NotMeasured) and len(measurement.latency) > 1:
        for entry in measurement.latency:
            found[f"{entry.runtime}_b{entry.batch_size}_t{entry.threads}_p50_ms"] = entry.p50_ms
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def headline(figures: dict[str, float]) -> dict[str, float]:
    """The figures that a parent run has by their bare names too, so that they share columns with its stages' runs."""
    return {name: figures[name] for name in ("size_bytes", "quality", "p50_ms", "speedup") if name in figures}


def prefixed(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {named(f"{prefix}/{name}"): value for name, value in figures.items()}


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names, for MLflow's parameters."""
    if isinstance(config, dict) and config:
        return {
            name: value
            for key, inner in config.items()
            for name, value in flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {named(prefix): str(config)[:PARAM_LIMIT]} if prefix else {}


def named(text: str) -> str:
    """`text` as MLflow takes it: it refuses `quantize+trace`, the key of a branch."""
    return FORBIDDEN.sub("_", text)[:NAME_LIMIT]

"""The run as a table for the console."""

from __future__ import annotations

from typing import Any

from optpipe.report import figures
from optpipe.report.schema import Latency, Measurement, NotMeasured, Quality, Report

TABLE_WIDTH = 150  # at least, where the output is no terminal
UNBOUNDED = 10_000
BUSY_CORES = 0.3  # kept busy by others: above what a quiet machine does beside a run


def table(report: Report) -> Any:
    """The run as a rich table: a row for the baseline in each runtime, and one per step."""
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"{report.recipe or 'pipeline'}: {report.status}; latency at batch 1 on the target"
    view = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("step", "status", "s"):
        view.add_column(column, justify="right" if column == "s" else "left", no_wrap=True)
    for column in ("KB", *_headings(report.baseline), "p50 ms", "× faster [95 %]", "verdict", "× same runtime"):
        view.add_column(column, justify="right", no_wrap=True)
    if isinstance(report.baseline, Measurement):
        latency = report.baseline.latency
        for i, entry in enumerate([None] if isinstance(latency, NotMeasured) else latency):
            size, *cells = _figures(report.baseline, entry)
            name = f"baseline, {entry.runtime}" if entry else "baseline"
            view.add_row(name, "", "", "" if i else size, *cells)
        view.add_section()
    for stage in report.stages:
        name = stage.stage if stage.stage.startswith(f"{stage.key}/") else f"{stage.key} ({stage.stage})"
        measurement = stage.measurement
        cells = ["–"] * 7 if isinstance(measurement, NotMeasured) else _figures(measurement, measurement.headline())
        status = f"{stage.status}, reused" if stage.cached else stage.status
        view.add_row(name, status, f"{stage.seconds:.1f}", *cells)
    return view


def missing(report: Report) -> list[str]:
    """Why there is no latency, for each reason the rows that have none."""
    named = [("baseline", report.baseline), *((stage.key, stage.measurement) for stage in report.stages)]
    reasons: dict[str, list[str]] = {}
    for name, measurement in named:
        latency = measurement if isinstance(measurement, NotMeasured) else measurement.latency
        if isinstance(latency, NotMeasured):
            reasons.setdefault(latency.not_measured, []).append(name)
    return [f"{', '.join(names)}: latency not measured: {reason}" for reason, names in reasons.items()]


def disturbed(report: Report) -> list[str]:
    """What was timed while other programs were busy: a load that lasts moves ratios, and no interval shows it."""
    named = [("baseline", report.baseline), *((stage.key, stage.measurement) for stage in report.stages)]
    busy: dict[str, float] = {}
    for name, measurement in named:
        latency = measurement if isinstance(measurement, NotMeasured) else measurement.latency
        for entry in [] if isinstance(latency, NotMeasured) else latency:
            if entry.other_load_cores > BUSY_CORES:
                busy[name] = max(busy.get(name, 0.0), entry.other_load_cores)
    if not busy:
        return []
    return [
        f"{', '.join(busy)}: other programs kept up to {max(busy.values()):.1f} cores busy meanwhile; engines suffer "
        "from that differently, so that these ratios are those of a busy machine"
    ]


def tried(report: Report) -> list[str]:
    """The alternatives of each step that had some, with their figures and why one was refused."""
    lines = []
    for stage in report.stages:
        if len(stage.attempts) == 1 and stage.attempts[0].ok and not stage.attempts[0].reason:
            continue  # the only way that was needed
        if stage.attempts:
            count = len(stage.attempts)
            lines.append(f"{stage.key}: {count} alternative{'s were' if count > 1 else ' was'} tried")
        for attempt in stage.attempts:
            how = "chosen" if attempt.chosen else "works" if attempt.ok else "refused"
            lines.append(f"  {how}: " + ", ".join(filter(None, [attempt.method, attempt.reason])))
    return lines


def reused(report: Report) -> list[str]:
    """What was not computed because an earlier run had done it."""
    steps = [stage for stage in report.stages if stage.cached]
    figured = [("baseline", report.baseline), *((stage.key, stage.measurement) for stage in report.stages)]
    known = [name for name, found in figured if isinstance(found, Measurement) and found.cached]
    saved = sum(stage.computed_seconds for stage in steps if not isinstance(stage.computed_seconds, NotMeasured))
    said = [f"reused from the store: {', '.join(s.key for s in steps)}, once {figures.seconds(saved)}"] if steps else []
    return said + ([f"measured by an earlier run on such a machine: {', '.join(known)}"] if known else [])


def forecast(report: Report) -> list[str]:
    """What the rehearsal predicted of the steps that ran to their end, beside what they took."""
    done = [stage for stage in report.stages if stage.status != "failed"]
    pairs = [(s.predicted_seconds, s.seconds) for s in done if not isinstance(s.predicted_seconds, NotMeasured)]
    if not pairs:
        return []
    predicted, real = (sum(column) for column in zip(*pairs, strict=True))
    said = f"predicted by a rehearsal of {figures.seconds(report.rehearsal_seconds)}: {figures.seconds(predicted)} for "
    return [f"{said}the steps' own work, which took {figures.seconds(real)}"]


def _headings(baseline: Measurement | NotMeasured) -> tuple[str, str]:
    """Of the quality and its difference: an arrow down marks a metric of which less is better."""
    if isinstance(baseline, NotMeasured) or isinstance(baseline.quality, NotMeasured):
        return "quality", "Δ [95 %]"
    quality = baseline.quality
    name, unit = ("quality", "points") if quality.unit == "fraction" else (quality.metric, quality.metric)
    return name + ("" if quality.higher_is_better else " ↓"), f"Δ {unit} [95 %]"


def show(view: Any) -> None:
    """Print a table; where the output is no terminal, as wide as it is."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
        console.width = max(TABLE_WIDTH, console.measure(view).maximum)
    with console.capture() as shown:
        console.print(view)
    print(shown.get(), end="")  # as any line: a sweep's live table makes room for what is printed


def _figures(measurement: Measurement, latency: Latency | None) -> list[str]:
    size, quality = measurement.size_bytes, measurement.quality
    cells = ["–" if isinstance(size, NotMeasured) else f"{size / 1000:.1f}"]
    if isinstance(quality, NotMeasured):
        cells += ["–", "–"]
    else:
        cells += _quality(quality)
    if latency is None:
        return [*cells, "–", "–", "–", "–"]
    low, high = latency.speedup_ci95
    same = latency.speedup_same_runtime
    shown = "–" if isinstance(same, NotMeasured) else f"{same:.2f}"
    return [*cells, f"{latency.p50_ms:.3f}", f"{latency.speedup:.2f} [{low:.2f}, {high:.2f}]", latency.verdict, shown]


def _quality(quality: Quality) -> list[str]:
    """Value, and difference with its interval: per cent and points, or plain numbers in the metric's own unit."""
    delta, (low, high) = quality.delta, quality.delta_ci95
    if quality.unit == "fraction":
        return [f"{quality.value:.2%}", f"{delta * 100:+.2f} [{low * 100:+.2f}, {high * 100:+.2f}]"]
    return [f"{quality.value:.4g}", f"{delta:+.3g} [{low:+.3g}, {high:+.3g}]"]

"""report.html: one run on one page that needs nothing else, on paper as on a screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from optpipe.budget import AT_LEAST
from optpipe.report import charts, figures, samples, templates
from optpipe.report.charts import Calls, Row
from optpipe.report.schema import (
    NOT_REHEARSED,
    Finding,
    Group,
    Interval,
    Latency,
    Measurement,
    NotMeasured,
    Quality,
    Report,
    StageResult,
)
from optpipe.report.tables import View

PAGE = "report.html"
AS_IT_CAME = "as it came in"


def write_page(report: Report, folder: Path) -> Path:
    """Write report.html into `folder`, whole or not at all; `folder` may hold the samples that report.json names."""
    return templates.write(
        templates.render("page.html.j2", page=Page(report, folder), report=report, at_least=AT_LEAST), folder / PAGE
    )


@dataclass(frozen=True)
class Key:
    """A figure of the headline."""

    label: str
    figure: str
    said: str


@dataclass(frozen=True)
class Before:
    """The unoptimised model's times beside one point of the final model's grid."""

    eager_ms: float | NotMeasured
    exported_ms: float | NotMeasured


class Page:
    """The parts of the page that are more than a figure of the report."""

    def __init__(self, report: Report, folder: Path) -> None:
        self.report, self.folder = report, folder
        self.baseline = report.baseline
        self.final = report.final if isinstance(report.final, NotMeasured) else report.final.measurement

    @property
    def title(self) -> str:
        return self.report.recipe or "pipeline"

    @property
    def failed(self) -> StageResult | None:
        """The step that ended the run."""
        return next((stage for stage in self.report.stages if stage.status == "failed"), None)

    @property
    def headline(self) -> list[Key]:
        """What came out, in four figures."""
        if isinstance(self.baseline, NotMeasured) or isinstance(self.final, NotMeasured):
            return []
        before, after = self.baseline, self.final
        return [_size(before, after), *self._speed(after), _quality(before, after)]

    def _speed(self, after: Measurement) -> list[Key]:
        labels = "Against the model as it came in", "Against it in the same runtime"
        latency = figures.headline(after)
        if isinstance(latency, NotMeasured):
            return [Key(label, "not measured", latency.not_measured) for label in labels]
        was = figures.words(self._before(latency).eager_ms, figures.milliseconds)
        ratio = f"{figures.times(latency.speedup)} {figures.interval(latency.speedup_ci95)}"
        said = f"{ratio}; a call takes {was} → {figures.milliseconds(latency.p50_ms)} at batch 1"
        first = Key(labels[0], figures.compared(latency.speedup, latency.verdict), said)
        same, ci95, judged = (
            latency.speedup_same_runtime,
            latency.speedup_same_runtime_ci95,
            latency.verdict_same_runtime,
        )
        if isinstance(same, NotMeasured) or isinstance(ci95, NotMeasured) or isinstance(judged, NotMeasured):
            reason = next(v.not_measured for v in (same, ci95, judged) if isinstance(v, NotMeasured))
            return [first, Key(labels[1], "not measured", reason)]
        ratio = f"{figures.times(same)} {figures.interval(ci95)}"
        said = f"{ratio} against the unoptimised export in {latency.runtime}: without the engine's own gain"
        return [first, Key(labels[1], figures.compared(same, judged), said)]

    # Over the steps.

    def _measured(self) -> Iterator[tuple[str, Measurement | NotMeasured, bool]]:
        yield AS_IT_CAME, self.baseline, True
        for stage in self.report.stages:
            back = " (rolled back)" if stage.status == "rolled_back" else ""
            chained = stage.status != "rolled_back"
            yield f"{stage.key}{back}", stage.measurement, chained

    def size_chart(self) -> Markup:
        rows = []
        for label, found, chained in self._measured():
            value = found if isinstance(found, NotMeasured) else found.size_bytes
            said = figures.words(value, figures.size)
            if isinstance(found, Measurement) and not isinstance(found.compressed_bytes, NotMeasured):
                said += f", {figures.size(found.compressed_bytes)} compressed"
            rows.append(Row(label=label, said=said, value=value, chained=chained))
        return charts.waterfall("size", "Size of the file after every step, and of its download compressed", rows)

    def latency_chart(self) -> Markup:
        """Time relative to the model as it came in, since that is what the rounds compare."""
        rows = []
        for label, found, chained in self._measured():
            rows.append(_relative(label, figures.headline(found), chained))
            if found is self.baseline and isinstance(exported := self._exported(), Latency):
                rows.append(_relative(f"unoptimised, {exported.runtime}", exported, True))
        return charts.waterfall("latency", "Time of a call after every step, relative to the model as it came in", rows)

    def quality_chart(self) -> Markup:
        rows, unit = [], None
        for label, found, chained in self._measured():
            quality = found if isinstance(found, NotMeasured) else found.quality
            if isinstance(quality, NotMeasured):
                said = figures.words(quality, str)
                rows.append(Row(label=label, said=said, value=quality, chained=chained))
                continue
            unit = unit or quality
            said = f"{figures.quality_value(quality)} ({figures.quality_change(quality)})"
            rows.append(Row(label=label, said=said, value=quality.delta, ci95=quality.delta_ci95, chained=chained))
        title = "Difference in quality from the model as it came in, after every step"
        shown = unit
        return charts.dots("quality", title, rows, lambda v: figures.quality_change(shown, v) if shown else "")

    @property
    def rehearsed(self) -> list[StageResult]:
        """The steps that a rehearsal predicted something of."""
        return [stage for stage in self.report.stages if stage.predicted_seconds != NOT_REHEARSED]

    def tables(self, stage: StageResult) -> list[View]:
        """What a step found out; the ids of its parts are its place in the run."""
        place = self.report.stages.index(stage) + 1
        return [View(table, f"table-{place}-{number}") for number, table in enumerate(stage.tables, 1)]

    # Of the model that came out.

    def _exported(self) -> Latency | NotMeasured:
        """The unoptimised model in the target's runtime."""
        if isinstance(self.baseline, NotMeasured):
            return self.baseline
        if isinstance(self.baseline.latency, NotMeasured):
            return self.baseline.latency
        first, *others = [entry for entry in self.baseline.latency if entry.batch_size == 1]
        return next((e for e in others if e.runtime != first.runtime), NotMeasured("the target's runtime is torch"))

    def references(self) -> list[tuple[str, Latency | NotMeasured]]:
        """The three models that the page sets side by side."""
        exported = self._exported()
        runtime = f", {exported.runtime}" if isinstance(exported, Latency) else ""
        return [
            ("as it came in, torch eager", figures.headline(self.baseline)),
            (f"unoptimised{runtime}", exported),
            ("final", figures.headline(self.final)),
        ]

    def calls(self) -> list[tuple[str, Calls | NotMeasured]]:
        """The time of a call of each: all from the final model's rounds where the run's folder still has them."""
        final = figures.headline(self.final)
        together = samples.calls(self.folder, final) if isinstance(final, Latency) else {}
        found: list[tuple[str, Calls | NotMeasured]] = []
        for (label, latency), name in zip(self.references(), ("eager", "exported", "subject"), strict=True):
            if isinstance(latency, NotMeasured):
                found.append((label, latency))
            elif name in together:
                found.append((label, Calls.of(label, together[name])))
            else:
                found.append((label, Calls.summary(label, latency)))
        return found

    def distributions(self) -> Markup | NotMeasured:
        found = [calls for _, calls in self.calls() if isinstance(calls, Calls) and calls.quantiles_ms]
        if not found:
            final = figures.headline(self.final)
            return final if isinstance(final, NotMeasured) else NotMeasured("the report holds no calls' times")
        return charts.distributions("distributions", "Distributions of the time of one call", found)

    def grid(self) -> list[tuple[Latency, Before]]:
        """Every point of the final model's grid."""
        if isinstance(self.final, NotMeasured) or isinstance(self.final.latency, NotMeasured):
            return []
        return [(entry, self._before(entry)) for entry in self.final.latency]

    def _before(self, entry: Latency) -> Before:
        """From the rounds of that point, else from the baseline's own measurement."""
        times = samples.calls(self.folder, entry)
        medians = {name: float(np.median(times[name])) for name in ("eager", "exported") if name in times}
        known = [] if isinstance(self.baseline, NotMeasured) else self.baseline.latency
        for found in [] if isinstance(known, NotMeasured) else known:
            if (found.batch_size, found.threads) == (entry.batch_size, entry.threads):
                medians.setdefault("eager" if found.runtime == "torch" else "exported", found.p50_ms)
        missing = NotMeasured("the run's folder has no samples of it")
        return Before(medians.get("eager", missing), medians.get("exported", missing))

    def findings(self) -> list[tuple[list[str], list[Finding]]]:
        """By step; neighbours that are one and the same file share theirs."""
        found: list[tuple[list[str], list[Finding]]] = []
        for label, measurement, _ in self._measured():
            causes = [] if isinstance(measurement, NotMeasured) else measurement.findings
            if found and found[-1][1] == causes:
                found[-1][0].append(label)
            else:
                found.append(([label], causes))
        final = [] if isinstance(self.final, NotMeasured) else self.final.findings
        if final not in [causes for _, causes in found]:
            found.append((["final"], final))
        return [(labels, causes) for labels, causes in found if causes]

    def roofline(self) -> Markup | NotMeasured:
        found = self.final if isinstance(self.final, NotMeasured) else self.final.roofline
        if isinstance(found, NotMeasured):
            return found
        return charts.roofline("roofline", "Roofline of this machine, and where the final model stands", found)

    def sustained(self) -> Markup | NotMeasured:
        found = self.final if isinstance(self.final, NotMeasured) else self.final.sustained
        if isinstance(found, NotMeasured) or not found.p50_ms:
            return found if isinstance(found, NotMeasured) else NotMeasured("no span was timed")
        return charts.sustained("sustained", "The median call in equal spans of a load without a pause", found)

    def groups(self) -> dict[str, list[Group]]:
        """The final model's quality by class, label or slice."""
        quality = self.final if isinstance(self.final, NotMeasured) else self.final.quality
        found: dict[str, list[Group]] = {}
        for group in [] if isinstance(quality, NotMeasured) else quality.groups:
            found.setdefault(group.by, []).append(group)
        return found


def _relative(label: str, latency: Latency | NotMeasured, chained: bool) -> Row:
    if isinstance(latency, NotMeasured):
        return Row(label=label, said=figures.words(latency, str), value=latency, chained=chained)
    low, high = latency.speedup_ci95
    ci95: Interval = (_inverse(high), _inverse(low))
    said = figures.milliseconds(latency.p50_ms)
    return Row(label=label, said=said, value=_inverse(latency.speedup), ci95=ci95, chained=chained)


def _inverse(value: float) -> float:
    return 1 / value if value else float("inf")


def _size(before: Measurement, after: Measurement) -> Key:
    was, now = before.size_bytes, after.size_bytes
    for value in (now, was):
        if isinstance(value, NotMeasured):
            return Key("Size", "not measured", value.not_measured)
    assert isinstance(was, int | float) and isinstance(now, int | float)
    shrunk = figures.shrunk(was, now) if was and now else "–"
    said = f"{figures.size(was)} → {figures.size(now)}"
    packed = (before.compressed_bytes, after.compressed_bytes)
    if not any(isinstance(value, NotMeasured) for value in packed):
        said += "; compressed for download " + " → ".join(figures.words(value, figures.size) for value in packed)
    return Key("Size", shrunk, said)


def _quality(before: Measurement, after: Measurement) -> Key:
    quality = after.quality
    if isinstance(quality, NotMeasured):
        return Key("Quality", "not measured", quality.not_measured)
    unit = figures.quality_unit(quality)
    was = before.quality
    value = figures.quality_value(quality)
    change = value if isinstance(was, NotMeasured) else f"{figures.quality_value(was)} → {value}"
    said = f"{quality.metric} {change}; 95 % interval of the difference {_bounds(quality)}, {quality.n:,} samples"
    low, high = quality.delta_ci95
    if low <= 0 <= high:
        said += "; no difference can be told"
    return Key("Quality", f"{figures.quality_change(quality)} {unit}", said)


def _bounds(quality: Quality) -> str:
    return figures.interval(quality.delta_ci95, lambda value: figures.quality_change(quality, value))

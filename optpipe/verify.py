"""Is what a run says still true? `python -m optpipe.verify RUN_DIR` checks its files and measures them again.

With --against OTHER_RUN it is a regression gate instead: both models, side by side in one comparison, on the data of
RUN_DIR. Exit codes: 0 if all is well, 1 if not, 2 for words that it does not understand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe.errors import OptpipeError

if TYPE_CHECKING:
    from optpipe.measure.latency import Comparison, Contender
    from optpipe.measure.statistics import Ratio
    from optpipe.predictions import Predictions
    from optpipe.report import Latency, Report
    from optpipe.task import Task

EXIT_PROBLEM = 1
MAX_SLOWDOWN = 0.05
MAX_DROP_POINTS = 0.5


@dataclass(frozen=True)
class Finding:
    """One figure or file, as it was recorded and as it is now."""

    what: str
    recorded: str
    now: str
    verdict: str  # "inside", "outside", …
    ok: bool


@dataclass
class Run:
    """A finished run, opened to be measured again. Raises OptpipeError if it is none."""

    folder: Path
    report: Report = field(init=False)
    config: dict[str, Any] = field(init=False)
    manifest: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        from optpipe import manifest
        from optpipe.plan import read_config
        from optpipe.report import NotMeasured, Report

        try:
            self.report = Report.read(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            raise OptpipeError(f"{self.folder} holds no report.json; name the folder of a run") from None
        except ValueError as error:
            raise OptpipeError(f"{self.folder / 'report.json'} cannot be read: {error}") from None
        if isinstance(self.report.final, NotMeasured) or self.report.status == "failed":
            raise OptpipeError(f"{self.folder} holds no finished run: {self.report.error or 'it has no final model'}")
        self.manifest = manifest.read(self.folder)
        self.config = read_config(self.folder)

    @property
    def model(self) -> Path:
        """The folder of the deployed model."""
        from optpipe.manifest import FOLDER

        return self.folder / FOLDER

    def task(self) -> Task:
        """The run's data, made again. Raises OptpipeError where it was not made by a factory."""
        from optpipe.sources import Data, build_task

        data = self.config.get("data")
        if data is None:
            raise OptpipeError("the task was given by a calling program, so it cannot be made again here")
        return build_task(Data(**data), str(self.folder))

    def predictions(self, task: Task) -> Predictions:
        """The deployed model on the test split of `task`."""
        from optpipe.forms import form
        from optpipe.machine import usable_cores
        from optpipe.measure.latency import Bench
        from optpipe.measure.settings import Measure

        found = form(self.manifest["form"])
        if self.manifest["runtime"] == "torch" and not self.manifest.get("options"):
            return task.predict(found.as_callable(found.load(self.model)), "test")
        with tempfile.TemporaryDirectory() as logs, Bench(Measure(), Path(logs)) as bench:
            with bench.evaluator(self.contender(usable_cores())) as model:
                return task.predict(model, "test")

    def contender(self, threads: int) -> Contender:
        """The deployed model in the engine that its manifest names."""
        from optpipe.measure.latency import Contender

        of, device = self.manifest, self.manifest["target"]["device"]
        return Contender(self.model, of["runtime"], threads, of["form"], device, of.get("options", {}))


def main(argv: Sequence[str] | None = None) -> int:
    """Verify a run, or compare it with another, as the command line asks; the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not options.against and (options.max_slowdown is not None or options.max_drop is not None):
        parser.error("--max-slowdown and --max-drop compare with another run; name it with --against")
    if options.junit and not options.junit.absolute().parent.is_dir():
        parser.error(f"--junit {options.junit}: there is no folder {options.junit.parent}")
    begin = time.perf_counter()
    try:
        run = Run(options.run)
        if options.against:
            title = f"{options.run} against {options.against}"
            slowdown = MAX_SLOWDOWN if options.max_slowdown is None else options.max_slowdown
            found = against(run, Run(options.against), slowdown, options.max_drop)
        else:
            title = f"{options.run}, measured again"
            found = again(run)
        _print(title, found)
        if options.junit:
            write_junit(options.junit, title, found, time.perf_counter() - begin)
    except OptpipeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_PROBLEM
    return 0 if all(finding.ok for finding in found) else EXIT_PROBLEM


def again(run: Run) -> list[Finding]:
    """The files and figures of one run, checked and measured again."""
    from optpipe.report import Final, Measurement

    final, baseline = run.report.final, run.report.baseline
    assert isinstance(final, Final) and isinstance(baseline, Measurement)
    found = files(run)
    if not all(finding.ok for finding in found):
        return found  # another model's figures would mean nothing
    return [*found, *_quality_again(run), *_latency_again(run)]


def files(run: Run) -> list[Finding]:
    """The deployed files against the sums in the manifest, and their size against the report."""
    from optpipe import manifest
    from optpipe.forms import form
    from optpipe.report import Final, NotMeasured

    found = []
    for name, facts in run.manifest["files"].items():
        now = manifest.facts(run.model / name) if (run.model / name).exists() else None
        shown = now["sha256"][:12] if now else "missing"
        ok = now == facts
        found.append(Finding(f"sha256 of {name}", facts["sha256"][:12], shown, "same" if ok else "changed", ok))
    assert isinstance(run.report.final, Final)
    recorded = run.report.final.measurement.size_bytes
    if not isinstance(recorded, NotMeasured) and all(finding.ok for finding in found):
        size = form(run.manifest["form"]).size_bytes(run.model)
        verdict = "same" if size == recorded else "changed"
        found.append(Finding("size", f"{recorded} bytes", f"{size} bytes", verdict, size == recorded))
    return found


def _quality_again(run: Run) -> list[Finding]:
    from optpipe.report import Final, NotMeasured

    assert isinstance(run.report.final, Final)
    recorded = run.report.final.measurement.quality
    if isinstance(recorded, NotMeasured):
        return [Finding("quality", "not measured", "", recorded.not_measured, True)]
    what = f"{recorded.metric} on {recorded.n} test samples"
    said = f"{recorded.value:.4f} [{recorded.ci95[0]:.4f}, {recorded.ci95[1]:.4f}]"
    try:
        task = run.task()
    except OptpipeError as error:
        return [Finding(what, said, "not measured", str(error), False)]
    if task.fingerprint != (run.report.data_fingerprint or None):
        return [Finding(what, said, "not measured", "the data is not that of the run", False)]
    now = run.predictions(task)
    if now.n != recorded.n:
        return [Finding(what, said, f"{now.value:.4f} on {now.n}", "not the samples of the run", False)]
    inside = recorded.ci95[0] <= now.value <= recorded.ci95[1]
    verdict = "inside" if inside else "outside"
    if task.fingerprint is None:
        verdict += "; the task has no fingerprint, so its data may be other data than the run's"
    return [Finding(what, said, f"{now.value:.4f}", verdict, inside)]


def _latency_again(run: Run) -> list[Finding]:
    """Every speed-up that the report has for the deployed model, in new processes."""
    from optpipe.fingerprint import differences, environment
    from optpipe.report import Final, NotMeasured

    assert isinstance(run.report.final, Final)
    recorded = run.report.final.measurement.latency
    if isinstance(recorded, NotMeasured):
        return [Finding("latency", "not measured", "", recorded.not_measured, True)]
    if other := differences(run.report.environment, environment()):
        reason = f"this is not where the run was measured: {'; '.join(other)}"
        return [Finding("latency", f"{recorded[0].p50_ms:.3f} ms", "not measured", reason, False)]
    found = []
    for threads in dict.fromkeys(entry.threads for entry in recorded):
        entries = [entry for entry in recorded if entry.threads == threads]
        for entry, comparison in zip(entries, _compare_again(run, entries), strict=True):
            found += _speedups_again(run, entry, comparison)
    return found


def _compare_again(run: Run, entries: list[Latency]) -> list[Comparison]:
    from optpipe.forms import FORMS, form
    from optpipe.measure.latency import Contender
    from optpipe.runtimes import RUNTIMES, engine_of

    runtime, threads, target = entries[0].runtime, entries[0].threads, run.manifest["target"]
    baseline = run.folder / "00_baseline"
    came_in_as = next(name for name in FORMS if any(path.exists() for path in form(name).files(baseline)))
    engine = engine_of(came_in_as, target["runtime"])

    def contender(folder: Path, name: str, form_name: str) -> Contender:
        options = run.manifest.get("options", {}) if name == target["runtime"] else {}
        return Contender(folder, name, threads, form_name, target["device"], options)

    as_it_came_in = replace(contender(baseline, engine, came_in_as), options={})  # as the run timed it
    team = [replace(run.contender(threads), runtime=runtime), as_it_came_in]
    exported = baseline if came_in_as in RUNTIMES[runtime] else baseline / "exported" / RUNTIMES[runtime][0]
    if runtime != engine and exported.is_dir() and any(exported.iterdir()):
        team.append(contender(exported, runtime, came_in_as if exported == baseline else RUNTIMES[runtime][0]))
    return _measured(run, team, [entry.batch_size for entry in entries])


def _measured(run: Run, team: list[Contender], batch_sizes: list[int]) -> list[Comparison]:
    """The team on the inputs that the run was timed on."""
    from optpipe.measure.latency import Bench
    from optpipe.measure.settings import Measure

    batches = [run.folder / "00_baseline" / f"inputs_{size}.npz" for size in batch_sizes]
    if missing := [batch for batch in batches if not batch.exists()]:
        raise OptpipeError(f"{missing[0]} is missing; without the inputs that were timed nothing can be timed again")
    settings = Measure(**run.config["measure"])
    settings = replace(settings, replicas=max(settings.replicas, Measure.replicas))  # a quick run's doubt is no excuse
    with tempfile.TemporaryDirectory() as logs, Bench(settings, Path(logs)) as bench:
        return bench.compare(team, batches)


def _speedups_again(run: Run, entry: Latency, comparison: Comparison) -> list[Finding]:
    from optpipe.report import NotMeasured

    what = f"batch {entry.batch_size}, {entry.threads} thread(s)"
    if comparison.problem:
        return [Finding(f"speed-up, {what}", f"{entry.speedup:.2f}", "not measured", comparison.problem, False)]
    found = [_ratio_again(f"speed-up, {what}", entry.speedup, entry.speedup_ci95, comparison.ratio(0, 1), run)]
    same, interval = entry.speedup_same_runtime, entry.speedup_same_runtime_ci95
    if isinstance(same, NotMeasured) or isinstance(interval, NotMeasured) or entry.runtime == "torch":
        return found
    if len(comparison.team) > 2:
        found.append(_ratio_again(f"in the same runtime, {what}", same, interval, comparison.ratio(0, 2), run))
    else:
        reason = "the exported baseline is missing from 00_baseline/exported"
        found.append(Finding(f"in the same runtime, {what}", f"{same:.2f}", "not measured", reason, False))
    return found


def _ratio_again(what: str, value: float, ci95: tuple[float, float], now: Ratio, run: Run) -> Finding:
    """Whether a new estimate lies in the recorded interval, or at least agrees with it within both their errors.

    Two honest estimates of one value leave each other's 95 % interval one time in six: that alone is no contradiction.
    """
    margin = float(run.config["measure"]["margin"])
    recorded = f"{value:.2f} [{ci95[0]:.2f}, {ci95[1]:.2f}]"
    shown = f"{now.value:.2f} [{now.ci95[0]:.2f}, {now.ci95[1]:.2f}]"
    if ci95[0] <= now.value <= ci95[1]:
        return Finding(what, recorded, shown, "inside", True)
    overlap = now.ci95[0] <= ci95[1] * (1 + margin) and now.ci95[1] * (1 + margin) >= ci95[0]
    verdict = f"close: the intervals meet within {margin:.0%}" if overlap else "outside"
    return Finding(what, recorded, shown, verdict, overlap)


def against(run: Run, other: Run, max_slowdown: float, max_drop: float | None) -> list[Finding]:
    """Whether `run` is slower or worse than `other` by more than is allowed, both measured now, side by side."""
    found = [*files(run), *files(other)]
    if all(finding.ok for finding in found):
        found += [_slowdown(run, other, max_slowdown), _drop(run, other, max_drop)]
    return found


def _slowdown(run: Run, other: Run, allowed: float) -> Finding:
    threads = run.manifest["target"]["threads"]
    team = [each.contender(threads) for each in (run, other)]
    (comparison,) = _measured(run, team, [1])
    what, limit = "time of a call, batch 1", f"at most {allowed:+.1%}"
    if comparison.problem:
        return Finding(what, limit, "not measured", comparison.problem, False)
    ratio = comparison.ratio(1, 0)  # time of this run's model / time of the other's
    low, high = (edge - 1 for edge in ratio.ci95)
    ok = ratio.value - 1 <= allowed
    verdict = ("within" if ok else "slower than allowed") + ("; undecided" if low < allowed < high else "")
    return Finding(what, limit, f"{ratio.value - 1:+.1%} [{low:+.1%}, {high:+.1%}]", verdict, ok)


def _drop(run: Run, other: Run, allowed: float | None) -> Finding:
    from optpipe.measure import quality

    task = run.task()
    ours, theirs = run.predictions(task), other.predictions(task)
    scale, unit = (100, " points") if task.metric.unit == "fraction" else (1, "")
    if allowed is None:
        if task.metric.unit != "fraction":
            raise OptpipeError(f"metric '{task.metric.name}' is no share; give --max-drop in its own unit")
        allowed = MAX_DROP_POINTS
    lost = ours.drop_from(theirs) * scale
    low, high = (edge * scale for edge in quality.drop_interval(ours, theirs))
    ok = lost <= allowed
    verdict = ("within" if ok else "worse than allowed") + ("; undecided" if low < allowed < high else "")
    what = f"drop of {task.metric.name} on {ours.n} test samples"
    return Finding(what, f"at most {allowed:g}{unit}", f"{lost:.2f} [{low:.2f}, {high:.2f}]{unit}", verdict, ok)


def write_junit(path: Path, title: str, found: list[Finding], seconds: float) -> None:
    """The findings as a test suite in JUnit's XML, which CI servers show."""
    from xml.etree import ElementTree

    failures = sum(not finding.ok for finding in found)
    facts = {"name": "optpipe.verify", "tests": str(len(found)), "failures": str(failures), "time": f"{seconds:.1f}"}
    suite = ElementTree.Element("testsuite", facts)
    for finding in found:
        case = ElementTree.SubElement(suite, "testcase", {"classname": title, "name": finding.what})
        said = f"recorded or allowed: {finding.recorded}; now: {finding.now}; {finding.verdict}"
        if finding.ok:
            ElementTree.SubElement(case, "system-out").text = said
        else:
            ElementTree.SubElement(case, "failure", {"message": finding.verdict}).text = said
    try:
        ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise OptpipeError(f"cannot write {path}: {error.strerror}") from error


def _print(title: str, found: list[Finding]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    bad = sum(not finding.ok for finding in found)
    table = Table(title=escape(title), title_justify="left", box=SIMPLE, pad_edge=False)
    for column in ("figure", "recorded or allowed", "now", "verdict"):
        table.add_column(column)
    for finding in found:
        table.add_row(*map(escape, (finding.what, finding.recorded, finding.now, finding.verdict)))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150
    console.print(table)
    print(f"{len(found) - bad} of {len(found)} hold" if bad else f"all {len(found)} hold")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optpipe.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--against", type=Path, metavar="OTHER_RUN", help="the run that must not be better")
    parser.add_argument("--max-slowdown", type=_share, metavar="5%", help="with --against, of a call (default 5%%)")
    parser.add_argument(
        "--max-drop",
        type=float,
        metavar="0.5",
        help="with --against, of quality: in points (default 0.5), or in the metric's own unit if it is no share",
    )
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the findings as JUnit XML too")
    return parser


def _share(text: str) -> float:
    """ "5%" or "0.05"."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give 5% or 0.05") from None
    if not text.endswith("%") and not -1 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is {share:.0%}; give 5% or 0.05")
    return share


if __name__ == "__main__":
    sys.exit(main())

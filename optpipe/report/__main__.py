"""The reports of finished runs: rebuild a page, set the runs of a sweep side by side, compare two."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from optpipe.errors import OptpipeError
from optpipe.report import NotMeasured, figures
from optpipe.report.console import show, table, tried
from optpipe.report.runs import Run, below, read, write_sweep
from optpipe.report.runs import table as table_of_runs
from optpipe.report.schema import FILE, Quality
from optpipe.search import read_weights

EXIT_PROBLEM = 1
EPILOG = """\
python -m optpipe.report outputs/runs/<time>      print the run's table and rebuild its report.html
python -m optpipe.report outputs/sweeps/<time>    set the runs below that folder side by side; writes sweep.html there
python -m optpipe.report outputs/sweeps/<time> --weights quality=1 latency=0.05
                                                  rank them by that sum too (docs/search.md has the objectives)
python -m optpipe.report A B                      compare run B with run A; more folders make a table
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Report on the folders of a command line; 1 if one of them cannot be read or written."""
    parser = argparse.ArgumentParser(
        prog="python -m optpipe.report",
        description="Reports of finished runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="+", type=Path, help="folder of a run, or one with several runs below it")
    parser.add_argument("--weights", nargs="+", default=[], metavar="OBJECTIVE=WEIGHT", help="rank a sweep's runs")
    asked = parser.parse_args(argv)
    folders: list[Path] = asked.folder
    try:
        weights = read_weights(asked.weights)
    except ValueError as error:
        print(f"error: --weights: {error}", file=sys.stderr)
        return EXIT_PROBLEM
    try:
        if len(folders) > 1:
            _compare([read(folder) for folder in folders])
        elif (folders[0] / FILE).exists():
            _run(folders[0])
        else:
            _sweep(folders[0], weights)
    except OptpipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_PROBLEM
    except OSError as error:
        print(f"error: the page could not be written: {error}", file=sys.stderr)
        return EXIT_PROBLEM
    return 0


def _run(folder: Path) -> None:
    from optpipe.report.page import write_page

    run = read(folder)
    show(table(run.report))
    print("".join(f"{line}\n" for line in tried(run.report)), end="")
    for violation in run.report.budget.violations:
        print(f"over budget: {violation}")
    if run.report.error:
        print(f"failed: {run.report.error}")
    print(f"page: {write_page(run.report, folder)}")


def _sweep(folder: Path, weights: Mapping[str, float]) -> None:
    from optpipe.report import front, scatter
    from optpipe.report.runs import reasons

    runs, problems = below(folder)
    flags = [*_machine_flags(runs), *problems]
    show(table_of_runs(runs, f"{folder}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}"))
    best = [*front.said(runs), *front.ranked(runs, weights)]
    for said in [*flags, *reasons(runs), *best]:
        print(said)
    print(f"page: {write_sweep(runs, folder, flags, best, scatter.drawn(runs))}")


def _machine_flags(runs: Sequence[Run]) -> list[str]:
    """The runs that were measured on another machine than the first."""
    from optpipe.report.compare import machine_differences

    found = [(run.name, machine_differences(runs[0], run)) for run in runs[1:]]
    return [
        f"{runs[0].name} and {name} were measured on different machines: {'; '.join(different)}; latency of the two "
        "cannot be compared"
        for name, different in found
        if different
    ]


def _compare(runs: Sequence[Run]) -> None:
    from optpipe.report.runs import reasons

    show(table_of_runs(runs, f"{len(runs)} runs"))
    for said in reasons(runs):
        print(said)
    if len(runs) > 2:
        print("\n".join(_machine_flags(runs)))
        return
    _compare_two(*runs)


def _compare_two(a: Run, b: Run) -> None:
    from optpipe.report.compare import compare

    found = compare(a, b)
    print(f"A is {a.name}\nB is {b.name}\n")
    if found.machines:
        print(f"! measured on different machines: {'; '.join(found.machines)}; latency of the two cannot be compared")
    if found.builds:
        print(f"! other builds: {'; '.join(found.builds)}; a difference may be theirs")
    if found.baselines:
        print(f"! other baselines: {'; '.join(found.baselines)}; the speed-ups are against different models or data")
    print("latency at batch 1, from the medians of replicas (fresh processes); above 1, B is faster")
    lines = (
        ("speed-up of B / speed-up of A, each against its own baseline in the same rounds", found.speedups),
        ("time of A / time of B", found.times),
    )
    for label, test in lines:
        print(f"  {label}:\n    {_said(test, ratio=True)}")
    print("  Trust the first most: what slowed the machine in one of the runs slowed its baseline too.")
    print(f"quality of B - quality of A, {'on the same samples' if found.paired else 'as independent samples'}")
    print(f"  {_said(found.quality, ratio=False, quality=_quality(a))}")


def _quality(run: Run) -> Quality | None:
    final = run.final
    return None if isinstance(final, NotMeasured) or isinstance(final.quality, NotMeasured) else final.quality


def _said(test: object, *, ratio: bool, quality: Quality | None = None) -> str:
    """A test in a line: value, interval, p, effect, n."""
    from optpipe.report.compare import Test

    if isinstance(test, NotMeasured):
        return figures.words(test, str)
    assert isinstance(test, Test)

    def form(value: float) -> str:
        if ratio or quality is None:
            return figures.number(value, 4)
        return figures.quality_change(quality, value)

    unit = f" {figures.quality_unit(quality)}" if quality else ""
    parts = [f"{form(test.value)}{unit} {figures.interval(test.ci95, form)}"]
    parts += [figures.probability(test.p) + " (Welch)"] if not isinstance(test.p, NotMeasured) else ["paired interval"]
    parts += [f"Cohen's d {figures.signed(test.cohens_d, 2)}"] if not isinstance(test.cohens_d, NotMeasured) else []
    neutral = 1.0 if ratio else 0.0
    parts.append(f"n {test.n[0]} and {test.n[1]} {'replicas' if ratio else 'samples'}")
    parts += ["no difference can be told"] if test.ci95[0] <= neutral <= test.ci95[1] else []
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())

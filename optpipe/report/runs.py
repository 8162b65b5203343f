"""Runs on disk, and a table of several: the settings that differ, and what came of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from optpipe.errors import OptpipeError
from optpipe.report import figures, templates
from optpipe.report.page import PAGE
from optpipe.report.schema import FILE, Latency, Measurement, NotMeasured, Report

SWEEP = "sweep.html"
FIGURES = ("status", "size", "quality", "Δ [95 %]", "p50", "× faster [95 %]", "verdict", "× same runtime")
MISSING = "–"


@dataclass(frozen=True)
class Run:
    """A run's folder with its report."""

    name: str
    folder: Path
    report: Report

    @property
    def settings(self) -> dict[str, str]:
        """Its overrides by key, without the signs that add one; of a key given twice the last."""
        pairs = (override.lstrip("+").partition("=") for override in self.report.overrides)
        return {key: value for key, _, value in pairs}

    @property
    def final(self) -> Measurement | NotMeasured:
        final = self.report.final
        return final if isinstance(final, NotMeasured) else final.measurement

    @property
    def latency(self) -> Latency | NotMeasured:
        """The final model's at batch 1."""
        return figures.headline(self.final)


def read(folder: Path, name: str = "") -> Run:
    """The run in `folder`. Raises OptpipeError that says what is wrong with it."""
    try:
        return Run(name or str(folder), folder, Report.read(folder))
    except FileNotFoundError:
        what = "there is no report.json in" if folder.is_dir() else "there is no folder"
        raise OptpipeError(f"{what} {folder}; give the folder of a run, for example outputs/runs/<time>") from None
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        file, said = folder / FILE, str(error)
        reason = said if said.startswith(str(file)) else f"{file} cannot be read: {said}"
        raise OptpipeError(f"{reason}; it may be cut off, or of another version of optpipe") from error


def below(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in the folders below `folder`, in natural order, and what is wrong with those that cannot be read.

    Raises OptpipeError if there is none.
    """
    found: list[Run] = []
    problems: list[str] = []
    for path in sorted(folder.rglob(FILE), key=lambda path: _natural(str(path))):
        try:
            found.append(read(path.parent, str(path.parent.relative_to(folder))))
        except OptpipeError as error:
            problems.append(str(error))
    if not found:
        where = f"there is no {FILE} in {folder} or below it" if folder.is_dir() else f"there is no folder {folder}"
        what = "; ".join([where, *problems]) if not problems else "; ".join(problems)
        raise OptpipeError(f"{what}; give the folder of a run, of a sweep, or of several runs")
    return found, problems


def _natural(text: str) -> list[tuple[int, str]]:
    """So that run 10 comes after run 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each run: its name, the settings that differ, and FIGURES."""
    keys = differing(runs)
    return [[run.name, *(run.settings.get(key, MISSING) for key in keys), *_figures(run)] for run in runs]


def _figures(run: Run) -> list[str]:
    status = f"{figures.MARKS[run.report.status]} {figures.STATUS[run.report.status]}"
    final = run.final
    if isinstance(final, NotMeasured):
        return [status, *[MISSING] * (len(FIGURES) - 1)]
    size, quality, latency = final.size_bytes, final.quality, run.latency
    cells = [status, MISSING if isinstance(size, NotMeasured) else figures.size(size)]
    if isinstance(quality, NotMeasured):
        cells += [MISSING, MISSING]
    else:
        cells += [figures.quality_value(quality), figures.quality_delta(quality)]
    if isinstance(latency, NotMeasured):
        return [*cells, *[MISSING] * 4]
    same = latency.speedup_same_runtime
    shown = MISSING if isinstance(same, NotMeasured) else figures.number(same)
    return [
        *cells, figures.milliseconds(latency.p50_ms), figures.speedup(latency), figures.verdict(latency.verdict), shown,
    ]  # fmt: skip


def reasons(runs: Sequence[Run]) -> list[str]:
    """Why figures of the table are missing."""
    said = []
    for run in runs:
        if run.report.error:
            said.append(f"{run.name}: {run.report.error.splitlines()[0]}")
        said += [f"{run.name}: over budget, {violation}" for violation in run.report.budget.violations]
        if isinstance(run.final, Measurement):
            parts = {"size": run.final.size_bytes, "quality": run.final.quality, "latency": run.final.latency}
            missing = {name: value for name, value in parts.items() if isinstance(value, NotMeasured)}
            said += [f"{run.name}: {name} {figures.words(value, str)}" for name, value in missing.items()]
    return said


def table(runs: Sequence[Run], title: str) -> Any:
    """The runs as a rich table."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=escape(title), title_justify="left", box=SIMPLE, pad_edge=False)
    keys = differing(runs)
    for i, column in enumerate(["run", *keys, *FIGURES]):
        text = i <= len(keys) + 1
        view.add_column(escape(column), justify="left" if text else "right", no_wrap=not 0 < i <= len(keys))
    for row in rows(runs):
        view.add_row(*map(escape, row))
    return view


def write_sweep(
    runs: Sequence[Run], folder: Path, flags: Sequence[str], front: Sequence[str] = (), picture: Markup | None = None
) -> Path:
    """Write sweep.html into `folder`: the table, with links to the pages of the runs.

    flags: what to mind. front: which of them nothing beats, in words. picture: the same as a drawing.
    """
    links = [
        quote((run.folder / PAGE).relative_to(folder).as_posix()) if (run.folder / PAGE).exists() else ""
        for run in runs
    ]
    columns = ["run", *differing(runs), *FIGURES]
    lines = list(zip(links, rows(runs), strict=True))
    text = templates.render(
        "sweep.html.j2",
        title=folder.resolve().name,
        columns=columns,
        lines=lines,
        flags=flags,
        reasons=reasons(runs),
        front=front,
        picture=picture,
    )
    return templates.write(text, folder / SWEEP)

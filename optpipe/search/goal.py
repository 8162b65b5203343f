"""The answer of a search for a goal: the plain recipe that keeps it, or the nearest miss."""

from __future__ import annotations

from pathlib import Path

from optpipe.report.schema import Check, Report
from optpipe.search.objectives import miss
from optpipe.search.study import nearest
from optpipe.sweep import Job, Ledger

FOLDER, MET, MISSED = "conf", "met", "nearest"


def best(ledger: Ledger) -> tuple[Job, Report, bool] | None:
    """The job that the search leads to, and whether it keeps all limits; None if none came to its end."""
    found = nearest(ledger)
    return (*found, miss(found[1]) <= 0) if found else None


def said(job: Job, report: Report, is_met: bool) -> list[str]:
    """The outcome in words: each limit, and by which figure it holds or not."""
    first = f"the goal is met by job {job.number}" if is_met else f"the goal is not met; job {job.number} comes nearest"
    checks = {check.limit: check for check in report.budget.checks if check.where == "run"}
    return [f"{first}:", *(f"  {_mark(check)} {check.said}" for check in checks.values())]


def write(text: str, folder: Path, is_met: bool) -> tuple[Path, str]:
    """Write the recipe `text` where --config-dir finds it; its path, and the command that runs it."""
    name = MET if is_met else MISSED
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    path = folder / FOLDER / "recipe" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m optpipe +recipe={name} --config-dir {folder / FOLDER}"
    path.write_text(text.replace("COMMAND", command))
    return path, command


def opening(words: str, job: Job, report: Report, is_met: bool) -> str:
    """The comment that a recipe opens with. words: the command of the search."""
    facts = [f"#   {line.strip()[2:]}" for line in said(job, report, is_met)[1:]]
    what = "Keeps" if is_met else "Comes nearest to"
    lines = ["# @package _global_", f"# {what} the goal of: {words}", *facts, "# Command:  COMMAND", ""]
    return "\n".join(lines)


def _mark(check: Check) -> str:
    return "✓" if check.holds else "✗"

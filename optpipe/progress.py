"""What a person sees while a run works: a line per event, and a bar for long loops. Written to standard error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)
log = logging.getLogger("optpipe")

T = TypeVar("T")


def say(message: str) -> None:
    """One line for the person who waits, and for the log."""
    console.print(message, markup=False)
    log.info(message)


def track(steps: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """`steps`, with a progress bar while they are consumed."""
    with _bar() as bar:
        yield from bar.track(steps, total=total, description=description)


@contextmanager
def stepwise(description: str) -> Iterator[Callable[[], None]]:
    """A line that counts the calls of what it yields. Redrawn only then: nothing runs beside what is being timed."""
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} done"), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
    with shown:
        task = shown.add_task(description)

        def step() -> None:
            shown.advance(task)
            shown.refresh()

        yield step


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without warnings that say nothing about the run: those of these loggers, and torch's about its own insides."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _bar() -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

"""The templates beside this file, with figures as filters. Everything is escaped: names and notes are users' text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from optpipe.report import figures
from optpipe.report.schema import NotMeasured

LONG = 400  # characters of a fact that the page shows
FORMS = (
    figures.size, figures.milliseconds, figures.seconds, figures.joules, figures.times, figures.number, figures.share,
    figures.count, figures.probability, figures.interval, figures.speedup, figures.quality_value,
    figures.quality_change, figures.quality_delta,
)  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A whole page from one of the templates beside this file."""
    return _environment().get_template(template).render(**values)


def write(text: str, path: Path) -> Path:
    """Write a page, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    found.filters.update({form.__name__: _or_reason(form) for form in FORMS})
    found.filters.update(verdict=figures.verdict, fact=_or_reason(fact), label=figures.STATUS.__getitem__)
    found.filters.update(mark=figures.MARKS.__getitem__, plain=_or_reason(str))
    found.tests["missing"] = lambda value: isinstance(value, NotMeasured)
    return found


def _or_reason(form: Callable[..., str]) -> Callable[..., str]:
    """`form`, which says instead why there is no figure where there is none."""

    def shown(value: Any, *others: Any) -> str:
        if isinstance(value, NotMeasured):
            return Markup('<span class="missing">not measured: {}</span>').format(value.not_measured)
        return form(value, *others)

    return shown


def fact(value: Any) -> str:
    """What a stage recorded, or a part of the environment, in a line of text."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", figures.MINUS)
    if isinstance(value, dict) and not any(isinstance(inner, dict | list) for inner in value.values()):
        said = ", ".join(f"{key} {fact(inner)}" for key, inner in value.items())
    elif isinstance(value, list | tuple) and not any(isinstance(inner, dict | list | tuple) for inner in value):
        said = ", ".join(map(fact, value))
    elif isinstance(value, dict | list | tuple):
        said = json.dumps(value, default=str, ensure_ascii=False)
    else:
        said = "none" if value is None else str(value)
    return said if len(said) <= LONG else f"{said[:LONG]}… (whole in report.json)"

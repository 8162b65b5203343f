"""The jobs of a sweep, and the search that a sweep may be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from optpipe.budget import Policy
from optpipe.command import Command
from optpipe.compose.checked import typed
from optpipe.compose.compositions import composed, parsed
from optpipe.errors import RecipeError, reason
from optpipe.search import Settings as SearchSettings
from optpipe.search.space import Choice as Categories
from optpipe.search.space import Dimension, Numbers, Space

SEARCH = "hydra_plugins.optpipe_search.Search"  # of hydra/sweeper=search


def hydra_node(command: Command) -> DictConfig | None:
    """What `hydra:` is composed to, with the first value of all that is swept; None where something is refused."""
    try:
        found: DictConfig = composed(_first_values(command.overrides), command, whole=True).hydra
        return found
    except RecipeError:
        return None  # what is wrong is said where it is composed for its plan


def to_check(command: Command, hydra: DictConfig | None) -> Iterator[list[str]]:
    """The first value of all that is swept together, then each other value beside the first of the rest.

    Of the numbers that a search draws from, the lowest and the highest stand for all.
    """
    if not command.is_sweep:
        yield command.overrides
        return
    choices = [_choices(text, ends=is_search(hydra)) for text in with_params(command.overrides, hydra)]
    first = [values[0] for values in choices]
    yield first
    for i, values in enumerate(choices):
        for value in values[1:]:
            yield [*first[:i], value, *first[i + 1 :]]


def combinations(command: Command) -> list[list[str]]:
    """The jobs of a sweep in the order in which Hydra's own sweeper makes them, none known where another chooses."""
    hydra = hydra_node(command)
    if (found := search(command)) is not None:
        return [[]] * found.settings.trials
    if hydra is not None and not is_basic(hydra):
        return []
    own = [text for text in with_params(command.overrides, hydra) if not text.startswith(("hydra.", "hydra/"))]
    return [list(chosen) for chosen in itertools.product(*map(_choices, own))]


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search, as a command asks for it."""

    settings: SearchSettings
    space: Space
    prunes: bool  # there is a limit that a job may break early, and nothing else was asked for then


def search(command: Command) -> Searched | None:
    """The search that the sweep `command` is, if it is one. Raises RecipeError for what is wrong with it."""
    hydra = hydra_node(command) if command.is_sweep else None
    if hydra is None or not is_search(hydra):
        return None
    settings = {str(key): value for key, value in hydra.sweeper.items() if key != "_target_"}
    config = composed(_first_values(command.overrides), command, whole=True)
    return searched(settings, command.overrides, config, command.subject)


def is_basic(hydra: DictConfig | None) -> bool:
    """Whether Hydra's own sweeper makes the jobs: every combination, in order."""
    return hydra is not None and str(hydra.sweeper._target_).endswith((".BasicSweeper", ".Once"))


def is_search(hydra: DictConfig | None) -> bool:
    return hydra is not None and hydra.sweeper._target_ == SEARCH


def searched(settings: Any, overrides: Sequence[str], config: DictConfig, subject: str = "this search") -> Searched:
    """The search that `settings` of hydra.sweeper ask for. config: one of its jobs', or with their first values.

    Raises RecipeError for what is wrong with it.
    """
    problems: list[str] = []
    found: SearchSettings | None = typed(SearchSettings, OmegaConf.create(settings), "hydra.sweeper", problems)
    fixed, dimensions = [], []
    own = [text for text in with_params(overrides, settings.get("params")) if not text.startswith(("hydra.", "hydra/"))]
    for text in own:
        override = parsed(text)
        if override is None or not override.is_sweep_override():
            fixed.append(text)
            continue
        try:
            dimensions.append(_dimension(override))
        except (ValueError, HydraException) as error:
            problems.append(f"'{text}': {reason(error)}")
    if not dimensions:
        problems.append("nothing is left to choose; give a setting several values, as in prune.ratio=interval(0.3,0.8)")
    space = Space(tuple(fixed), tuple(dimensions))
    if found is not None:
        given = {text.lstrip("+").split("=")[0] for text in fixed}  # what a command fixes is not tried otherwise
        first = [{key: value for key, value in tried.items() if key not in given} for tried in found.first]
        try:
            found = replace(found, first=[space.read(tried) for tried in first if tried])
        except ValueError as error:
            problems.append(f"hydra.sweeper.first: {error}")
    if problems or found is None:
        raise RecipeError(problems, subject)
    budget = config.budget
    prunes = found.prune and not found.is_for_goal and budget.quality_drop is not None
    return Searched(found, space, prunes and budget.policy in (Policy.warn, Policy.warn.value))


def with_params(overrides: Sequence[str], hydra: Any) -> list[str]:
    """`overrides` behind what a configuration adds to every sweep (hydra.sweeper.params), unless they say it too."""
    params = hydra.sweeper.get("params") if isinstance(hydra, DictConfig) and "sweeper" in hydra else hydra
    given = {text.lstrip("+").split("=")[0] for text in overrides}
    return [*(f"{key}={value}" for key, value in (params or {}).items() if key not in given), *overrides]


def _dimension(override: Override) -> Dimension:
    """What a search draws from. Raises ValueError for an empty one."""
    key, value = (override.input_line or "").split("=")[0], override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Numbers(key, value.start, value.end, whole=whole, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        steps = [float(f"{float(step):.12g}") for step in value.range()]  # it adds up, and 0.95 becomes 0.95…01
        if not steps:
            raise ValueError("its range is empty")
        whole = isinstance(value.start, int) and isinstance(value.step, int)
        return Numbers(key, min(steps), max(steps), step=abs(float(value.step)), whole=whole)
    return Categories(key, tuple(override.sweep_string_iterator()))


def _first_values(overrides: Sequence[str]) -> list[str]:
    return [_choices(text)[0] for text in overrides]


def _choices(text: str, *, ends: bool = False) -> list[str]:
    """The values of an override that is swept, of an interval its ends; the override itself of any other.

    ends: of a range too.
    """
    override = parsed(text)
    if override is None or not override.is_sweep_override():
        return [text]
    key = (override.input_line or "").split("=")[0]
    try:
        if ends and override.is_range_sweep():
            return [f"{key}={value}" for value in dict.fromkeys(_dimension(override).ends)]
        if isinstance(interval := override.value(), IntervalSweep):
            return [f"{key}={interval.start}", f"{key}={interval.end}"]
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError):
        return [f"{key}={override.value()}"]

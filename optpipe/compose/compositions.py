"""Overrides to a configuration, by Hydra. It stops at the first thing that is wrong; `refusals` finds the others."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optpipe.command import Command
from optpipe.compose.groups import CONF, SETTINGS
from optpipe.compose.refusals import REFUSALS, explain, one_by_one
from optpipe.errors import RecipeError


def composed(overrides: Sequence[str], command: Command, *, whole: bool = False) -> DictConfig:
    """Compose `overrides`. Raises RecipeError with a problem for each that Hydra refuses.

    whole: with Hydra's own node.
    """
    asked = tuple(overrides), whole
    if asked not in command.composed:
        known = None if whole else _derived(overrides, command)
        command.composed[asked] = known or _compose(overrides, command, whole)
    config: DictConfig = command.composed[asked].copy()
    return config


def _derived(overrides: Sequence[str], command: Command) -> DictConfig | None:
    """From what was composed before, where no more than plain values differ: that takes no time."""
    for (known, _), config in command.composed.items():
        changed = changes(known, overrides)
        if changed is None:
            continue
        found = _without_hydra(config)
        try:
            for override in changed:
                OmegaConf.update(found, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return None  # composing it says what is wrong
        return found
    return None


def changes(before: Sequence[str], after: Sequence[str]) -> list[Override] | None:
    """The plain values in which two commands differ; None if there is more between them than that."""
    if len(before) != len(after):
        return None
    places = [place for place, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
    changed = []
    for place in places:
        old, new = _plain_value(before[place]), _plain_value(after[place])
        if old is None or new is None or old.key_or_group != new.key_or_group:
            return None
        others = [*after[:place], *after[place + 1 :]]
        if any(_overlap(key, new.key_or_group) for key in map(_set_by, others) if key):
            return None  # which of them holds is decided by their order
        changed.append(new)
    return changed


def parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None  # composing it says what is wrong


@functools.cache
def _plain_value(text: str) -> Override | None:
    """The override `text`, if all that it does is to set something to another value."""
    found = parsed(text)
    if found is None or found.type is not OverrideType.CHANGE or found.package or found.is_sweep_override():
        return None
    if isinstance(found.value(), dict):
        return None  # goes into what is there, and takes nothing away
    return found if _set_by(text) and not found.is_hydra_override() else None


def _set_by(text: str) -> str:
    """The setting that an override is about; empty for one that chooses from a config group."""
    key = text.lstrip("+~").partition("=")[0]
    return key if "@" not in key and ("." in key or key in SETTINGS) else ""


def _overlap(one: str, other: str) -> bool:
    """Whether one of two keys holds the other, or they are the same."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _compose(overrides: Sequence[str], command: Command, whole: bool) -> DictConfig:
    with _own_hydra(), initialize_config_dir(str(CONF), version_base="1.3", job_name="optpipe"):
        extra = [f"hydra.searchpath=[file://{command.config_dir.resolve()}]"] if command.config_dir else []
        try:
            config: DictConfig = compose("config", overrides=[*extra, *overrides], return_hydra_config=whole)
            return config
        except REFUSALS as error:
            problems = one_by_one(extra, overrides, command) or [explain("", error, command)]
            raise RecipeError(problems, command.subject) from error


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Compose although another Hydra application may be running; leave its global state as it was."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])

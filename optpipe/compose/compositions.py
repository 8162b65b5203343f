"""Overrides to a configuration, by Hydra. It stops at the first thing that is wrong; `refusals` finds the others."""

from __future__ import annotations

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
    """From what was composed before, where no more than one plain value differs: that takes no time."""
    for (known, _), config in command.composed.items():
        if len(known) != len(overrides):
            continue
        others = [(one, other) for one, other in zip(known, overrides, strict=True) if one != other]
        if not others:
            return _without_hydra(config)
        before, after = (_plain_value(text) for text in others[0])
        if len(others) == 1 and before and after and before.key_or_group == after.key_or_group:
            config = _without_hydra(config)
            try:
                OmegaConf.update(config, after.key_or_group, after.value(), merge=True)
            except OmegaConfBaseException:
                return None  # composing it says what is wrong
            return config
    return None


def parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None  # composing it says what is wrong


def _plain_value(text: str) -> Override | None:
    """The override `text`, if all that it does is to set something to another value."""
    found = parsed(text)
    if found is None or found.type is not OverrideType.CHANGE or found.package or found.is_sweep_override():
        return None
    return found if "." in found.key_or_group or found.key_or_group in SETTINGS else None


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

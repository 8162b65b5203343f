"""A configuration as a plain recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from optpipe.command import Command
from optpipe.compose.checked import plan
from optpipe.compose.compositions import composed


def recipe_of(overrides: Sequence[str], command: Command) -> str:
    """The body of a plain recipe that composes to what `overrides` do: options of groups, and what differs in them."""
    config = composed(overrides, command, whole=True)
    chosen = {str(key): str(value) for key, value in config.hydra.runtime.choices.items()}
    plain = composed([], command, whole=True)
    known = {str(key): str(value) for key, value in plain.hydra.runtime.choices.items()}
    found = plan(composed(overrides, command), recipe=command.recipe, overrides=overrides, subject=command.subject)
    used = {key: value for key, value in found.config.items() if key not in ("recipe", "goal", "plugins", "dry_run")}
    defaults, groups = [], []
    for key, option in chosen.items():
        package = key.partition("@")[2] or key
        if package in used and known.get(key) != option:
            defaults.append(f"{'override ' if key in known else ''}/{key}: {option}")
            groups.append(f"{'' if key in known else '+'}{key}={option}")
    base = OmegaConf.to_container(composed(groups, command), resolve=True, enum_to_str=True)
    assert isinstance(base, dict)
    body = _difference(used, base)
    lines = ["defaults:", *(f"  - {line}" for line in defaults), ""] if defaults else []
    return "\n".join([*lines, OmegaConf.to_yaml(OmegaConf.create(body))])


def _difference(wanted: dict[str, Any], base: dict[Any, Any]) -> dict[str, Any]:
    """What `wanted` sets otherwise than `base`, down to single values."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        inner = base.get(key)
        if isinstance(value, dict) and isinstance(inner, dict) and value:
            value = _difference(value, inner)
            if value:
                found[key] = value
        elif key not in base or value != inner:
            found[key] = value
    return found

"""What Hydra refuses, in words that name the remedy: the overrides are tried one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra import compose
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optpipe import registry
from optpipe.command import Command
from optpipe.compose.groups import SCHEMAS, SETTINGS, recipes
from optpipe.errors import did_you_mean, reason

REFUSALS = (HydraException, OmegaConfBaseException, ValueError)  # what Hydra raises for a bad override
LAUNCHER_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}  # whose package has it


def one_by_one(extra: list[str], overrides: Sequence[str], command: Command) -> list[str]:
    """Add the overrides one after the other, groups before values, and explain those that are refused."""
    accepted, problems, refused_keys = list(extra), [], set()
    for override in sorted(overrides, key=lambda text: _sort_key(text)):
        top = re.split(r"[.=@]", override.lstrip("+~"))[0]
        try:
            compose("config", overrides=[*accepted, override])
            accepted.append(override)
        except REFUSALS as error:
            package = re.match(r"\+?[\w/]+@(\w+)", override)
            if top not in refused_keys:
                problems.append(explain(override, error, command))
            refused_keys.add(package.group(1) if package else top)
    return problems


def _sort_key(override: str) -> int:
    """Recipe first, then group choices, then single settings."""
    key = override.lstrip("+~").split("=")[0]
    return 0 if key == "recipe" else 2 if "." in key else 1


def explain(override: str, error: Exception, command: Command) -> str:
    """What is wrong with `override`, in words that name the remedy."""
    text = str(error)
    cause = error.__cause__ or error
    value = override.partition("=")[2]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        known = (
            recipes(command.config_dir) if group == "recipe" else [o.removesuffix(".yaml") for o in error.options or []]
        )
        if extra := LAUNCHER_EXTRAS.get(option):
            return f"'{override}': needs the launcher {option}, not installed here; pip install \"optpipe[{extra}]\""
        hint = did_you_mean(option, known) or ";"
        return f"there is no {group or 'config'} '{option}'{hint} there are {', '.join(known)}"
    if found := re.search(r"Key '(\w+)' (?:not in '(\w+)'|is not in struct)", f"{text} {cause}"):
        return _unknown_key(override, found.group(1), found.group(2), command)
    if "No match in the defaults list" in text or "Could not find match" in text:
        key = override.split("=")[0]
        known = sorted({*SCHEMAS, *registry.families()})
        return f"'{override}': there is no '{key}' to choose{did_you_mean(key.lstrip('+'), known)}"
    if value in ("null", "") and override.split("=")[0] in registry.families():
        return f"'{override}': a stage family cannot be empty; leave its key out of pipeline=[…] instead"
    said = reason(cause)
    return f"'{override}': {said}" if override else f"{said} ({value})" if value else said


def _unknown_key(override: str, key: str, owner: str | None, command: Command) -> str:
    path = override.lstrip("+").split("=")[0]
    parent = path.rpartition(".")[0]
    if not parent:
        known = sorted({*SCHEMAS, *registry.families(), *SETTINGS})
        return f"'{override}': there is no setting '{key}'{did_you_mean(key, known)}"
    config = compose("config", overrides=[f"+recipe={command.recipe}"] if command.recipe in recipes(None) else [])
    node = OmegaConf.select(config, parent)
    fields = [str(name) for name in node] if isinstance(node, DictConfig) else []
    kind = f"{parent} ({owner})" if owner else parent
    if path == "budget.stages":
        return f"'{override}': set the limits of one step at a time: '+budget.stages.{key}={{quality_drop: 0.01}}'"
    if parent.endswith(".args") or parent == "budget.stages":
        return f"'{override}': {parent} has no '{key}' yet; add it as '+{override.lstrip('+')}'"
    if override.partition("=")[2].startswith("{"):
        return f"'{override}': {path} has no '{key}' yet; add it as '+{override.lstrip('+')}'"
    hint = did_you_mean(key, fields) or (f"; it has {', '.join(fields)}" if fields else "")
    return f"'{override}': {kind} has no setting '{key}'{hint}"

"""What must be known before anything is composed: schemas, stages and the user's plug-ins."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from optpipe import registry
from optpipe.command import Command
from optpipe.compose.groups import CONF, SCHEMAS
from optpipe.errors import RecipeError


def prepare(command: Command) -> None:
    """Register schemas, optpipe's stages and the user's plug-ins. Raises RecipeError if one cannot be imported."""
    for name, schema in SCHEMAS.items():
        registry.store_schema(name, schema)
    registry.load_stages()
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # the console script, unlike `python -m`, does not look there
    problems = []
    if command.config_dir and not command.config_dir.is_dir():
        problems.append(f"--config-dir is '{command.config_dir}', which is not a folder")
    problems += registry.load_plugins(_plugins(command))
    problems += _shadowed(command)
    if problems:
        raise RecipeError(problems, command.subject)


def _plugins(command: Command) -> list[str]:
    """The modules named by `plugins=[…]` on the command line and by plugins.yaml in the --config-dir folder."""
    named: list[str] = []
    file = command.config_dir / "plugins.yaml" if command.config_dir else None
    if file and file.exists():
        loaded = OmegaConf.to_container(OmegaConf.load(file))
        listed = loaded.get("plugins") if isinstance(loaded, dict) else loaded
        if not isinstance(listed, list):
            raise RecipeError([f"{file} must hold a list, `plugins: [my_package.my_stage]`"], command.subject)
        named += map(str, listed)
    for override in command.overrides:
        key, equals, value = override.lstrip("+").partition("=")
        if key == "plugins" and equals:
            named += [name.strip(" '\"") for name in value.strip("[] ").split(",") if name.strip()]
    return named


def _shadowed(command: Command) -> list[str]:
    """Hydra silently takes its own file where the user's has the same name."""
    if not command.config_dir:
        return []
    own = (path.relative_to(command.config_dir) for path in sorted(command.config_dir.rglob("*.yaml")))
    return [
        f"{command.config_dir / path} has the name of a built-in file, which Hydra would take instead; rename it"
        for path in own
        if (CONF / path).exists()
    ]

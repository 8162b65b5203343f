"""A command line, taken apart: flags for Hydra, overrides, and what optpipe must know before Hydra starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS_WITH_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
FLAGS_WITH_VALUE |= {"--experimental-rerun"}


@dataclass(kw_only=True)
class Command:
    """A command line, taken apart."""

    flags: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    config_dir: Path | None = None
    is_sweep_by_recipe: bool = False
    sweeper: str = ""  # hydra/sweeper, where it is to be another than was asked for
    composed: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # by overrides, what they gave

    @property
    def recipe(self) -> str:
        return next((o.split("=", 1)[1] for o in self.overrides if re.match(r"\+?recipe=", o)), "")

    @property
    def subject(self) -> str:
        return f"+recipe={self.recipe}" if self.recipe else "this run"

    @property
    def is_question(self) -> bool:
        """Whether it only asks Hydra for help or information."""
        asked = (
            "--help",
            "-h",
            "--hydra-help",
            "--version",
            "--info",
            "-i",
            "--cfg",
            "-c",
            "--shell-completion",
            "-sc",
        )
        return any(flag.split("=")[0] in asked for flag in self.flags)

    @property
    def is_sweep(self) -> bool:
        return "--multirun" in self.flags or "-m" in self.flags

    def begin_sweep(self) -> None:
        """Be a sweep, as with --multirun, because the recipe says so."""
        if not self.is_sweep:
            self.flags.append("--multirun")
            self.is_sweep_by_recipe = True

    @property
    def output_root(self) -> Path:
        """The folder that the run's own folder will lie in, as far as it can be known before the run."""
        key = "hydra.sweep.dir=" if self.is_sweep else "hydra.run.dir="
        given = next((o.split("=", 1)[1] for o in self.overrides if o.startswith(key)), "outputs")
        return Path(given.split("${")[0])

    @property
    def sweep_dir(self) -> Path | None:
        """The folder that a sweep was given."""
        key = "hydra.sweep.dir="
        return next((Path(o.removeprefix(key)) for o in self.overrides if o.startswith(key)), None)

    @property
    def run_dir(self) -> Path | None:
        """The folder that a single run was given by its name."""
        given = [
            o.removeprefix("hydra.run.dir=").strip("'\"") for o in self.overrides if o.startswith("hydra.run.dir=")
        ]
        return Path(given[-1]) if given and "${" not in given[-1] else None

    def move_sweep_to(self, folder: Path) -> None:
        """Run the sweep in `folder`, whatever was named."""
        self.overrides = [o for o in self.overrides if not o.startswith("hydra.sweep.dir=")]
        self.overrides.append(f"hydra.sweep.dir='{folder}'")

    def argv(self) -> list[str]:
        """Overrides first: Hydra does not parse those that follow a flag with a value."""
        return [*self.overrides, *([f"hydra/sweeper={self.sweeper}"] if self.sweeper else []), *self.flags]

    def again(self, overrides: Sequence[str], *, alone: bool = True) -> str:
        """The command that repeats one run, of a sweep for instance, with `overrides`; quoted for a shell.

        alone: whether that is no sweep, though its recipe makes one by itself.
        """
        folder = ["--config-dir", str(self.config_dir)] if self.config_dir else []
        mode = ["hydra.mode=RUN"] if self.is_sweep_by_recipe and alone else []
        return shlex.join(["python", "-m", "optpipe", *overrides, *mode, *folder])


def read(argv: Sequence[str]) -> Command:
    """Take a command line apart, whatever the order of flags and overrides."""
    command, rest = Command(), list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            command.overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        command.flags.append(word)
        if name in FLAGS_WITH_VALUE and not equals and rest:
            value = rest.pop(0)
            command.flags.append(value)
        if name in ("--config-dir", "-cd"):
            command.config_dir = Path(value)
    return command

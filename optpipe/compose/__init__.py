"""Everything about Hydra's composition: from command-line overrides to a checked Plan."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.types import RunMode

from optpipe.command import Command
from optpipe.compose.as_recipe import recipe_of as recipe_of
from optpipe.compose.checked import plan as plan
from optpipe.compose.compositions import composed as composed
from optpipe.compose.groups import CONF as CONF
from optpipe.compose.groups import builtin_recipes as builtin_recipes
from optpipe.compose.groups import recipes
from optpipe.compose.jobs import Here as Here
from optpipe.compose.jobs import at_once as at_once
from optpipe.compose.jobs import of_hydra as of_hydra
from optpipe.compose.plugins import prepare as prepare
from optpipe.compose.sweeps import combinations as combinations
from optpipe.compose.sweeps import hydra_node, is_basic, to_check
from optpipe.compose.sweeps import search as search
from optpipe.compose.sweeps import searched as searched
from optpipe.errors import RecipeError
from optpipe.plan import Plan


def check(command: Command) -> list[Plan]:
    """Compose and check what `command` asks for, every value of a sweep included. Raises RecipeError.

    A recipe that sweeps by itself (hydra.mode) makes the command a sweep.
    """
    problems: list[str] = []
    plans: list[Plan] = []
    if not command.recipe and not any(re.match(r"\+?pipeline=", override) for override in command.overrides):
        listed = "\n      ".join(f"+recipe={name}" for name in recipes(command.config_dir))
        problems.append(f"no recipe is given; add one of\n      {listed}\n    or your own pipeline=[…]")
    hydra = hydra_node(command)
    if hydra is not None and hydra.mode is RunMode.MULTIRUN:
        command.begin_sweep()
    if command.is_sweep and is_basic(hydra):
        command.sweeper = "once"
    for combination in to_check(command, hydra):
        try:
            plans.append(_checked(combination, command))
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if not problems:
        search(command)
    if problems:
        raise RecipeError(problems, command.subject)
    return plans


def _checked(overrides: Sequence[str], command: Command) -> Plan:
    config = composed(overrides, command)
    return plan(config, recipe=command.recipe, overrides=overrides, subject=command.subject)

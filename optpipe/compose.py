"""Everything about Hydra's composition: from command-line overrides to a checked Plan.

Hydra stops at the first thing that is wrong. Here the overrides are then tried one by one, and what they compose to is
checked as a whole, so that one RecipeError holds every problem.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optpipe import machine, registry, sources
from optpipe.budget import Budget, Policy
from optpipe.command import Command
from optpipe.errors import RecipeError, did_you_mean, reason
from optpipe.measure.settings import Measure
from optpipe.plan import (
    Choice,
    Entry,
    Plan,
    Step,
    budget_problems,
    chain_problems,
    forms_along,
    method_of,
    spoken,
    steps_of,
)
from optpipe.runtimes import RUNTIMES, installed_for, missing, setting_problems
from optpipe.search import Settings as SearchSettings
from optpipe.search.space import Choice as Categories
from optpipe.search.space import Dimension, Numbers, Space
from optpipe.store import Settings as StoreSettings
from optpipe.target import Target
from optpipe.tracking import Tracking

_HERE = Path(__file__).resolve().parent
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if (folder / "config.yaml").exists())

SCHEMAS: dict[str, type] = {
    "model": sources.Model,
    "data": sources.Data,
    "target": Target,
    "budget": Budget,
    "measure": Measure,
    "tracking": Tracking,
    "store": StoreSettings,
}
SEARCH = "hydra_plugins.optpipe_search.Search"  # of hydra/sweeper=search
SETTINGS = {"pipeline", "seed", "device", "plugins", "rehearse", "dry_run", "relax", "goal"}
LAUNCHER_EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "slurm"}  # whose package has it
REFUSALS = (HydraException, OmegaConfBaseException, ValueError)  # what Hydra raises for a bad override

T = TypeVar("T")


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


def builtin_recipes() -> list[str]:
    return sorted(path.stem for path in (CONF / "recipe").glob("*.yaml"))


def recipes(config_dir: Path | None) -> list[str]:
    """Every recipe that +recipe= can name."""
    own = [path.stem for path in (config_dir / "recipe").glob("*.yaml")] if config_dir else []
    return sorted({*builtin_recipes(), *own})


def check(command: Command) -> list[Plan]:
    """Compose and check what `command` asks for, every value of a sweep included. Raises RecipeError.

    A recipe that sweeps by itself (hydra.mode) makes the command a sweep.
    """
    problems: list[str] = []
    plans: list[Plan] = []
    if not command.recipe and not any(re.match(r"\+?pipeline=", override) for override in command.overrides):
        listed = "\n      ".join(f"+recipe={name}" for name in recipes(command.config_dir))
        problems.append(f"no recipe is given; add one of\n      {listed}\n    or your own pipeline=[…]")
    hydra = _hydra_node(command)
    if hydra is not None and hydra.mode is RunMode.MULTIRUN:
        command.begin_sweep()
    overrides = _with_params(command.overrides, hydra) if command.is_sweep else command.overrides
    for combination in _sweep_combinations(overrides, _is_search(hydra)) if command.is_sweep else [overrides]:
        try:
            config = _without_hydra(composed(combination, command, whole=True))
            plans.append(plan(config, recipe=command.recipe, overrides=combination, subject=command.subject))
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if not problems:
        search(command)
    if problems:
        raise RecipeError(problems, command.subject)
    return plans


def _hydra_node(command: Command) -> DictConfig | None:
    """What `hydra:` is composed to, with the first value of all that is swept; None where something is refused."""
    try:
        found: DictConfig = composed(_first_values(command.overrides), command, whole=True).hydra
        return found
    except RecipeError:
        return None  # what is wrong is said where it is composed for its plan


def _first_values(overrides: Sequence[str]) -> list[str]:
    return [text if (override := _parsed(text)) is None else _values(override)[0] for text in overrides]


def composed(overrides: Sequence[str], command: Command, *, whole: bool = False) -> DictConfig:
    """Compose `overrides`. Raises RecipeError with a problem for each that Hydra refuses.

    whole: with Hydra's own node.
    """
    known = tuple(overrides), command.config_dir, whole
    if known not in _composed:
        _composed.clear()  # the last one only: whoever asks twice does so at once
        _composed[known] = _compose(overrides, command, whole)
    return _composed[known].copy()


_composed: dict[Any, DictConfig] = {}


def _compose(overrides: Sequence[str], command: Command, whole: bool) -> DictConfig:
    with _own_hydra(), initialize_config_dir(str(CONF), version_base="1.3", job_name="optpipe"):
        extra = [f"hydra.searchpath=[file://{command.config_dir.resolve()}]"] if command.config_dir else []
        try:
            config: DictConfig = compose("config", overrides=[*extra, *overrides], return_hydra_config=whole)
            return config
        except REFUSALS as error:
            problems = _one_by_one(extra, overrides, command) or [_explain("", error, command)]
            raise RecipeError(problems, command.subject) from error


def _one_by_one(extra: list[str], overrides: Sequence[str], command: Command) -> list[str]:
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
                problems.append(_explain(override, error, command))
            refused_keys.add(package.group(1) if package else top)
    return problems


def _sort_key(override: str) -> int:
    """Recipe first, then group choices, then single settings."""
    key = override.lstrip("+~").split("=")[0]
    return 0 if key == "recipe" else 2 if "." in key else 1


def _explain(override: str, error: Exception, command: Command) -> str:
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


@dataclasses.dataclass(frozen=True)
class Here:
    """Where Hydra runs a job."""

    folder: Path
    overrides: list[str]
    number: int = 0  # of a sweep's jobs
    sweep_folder: Path = Path()
    at_once: int = 1  # jobs that its launcher runs on one machine
    cores: int | None = None  # that its launcher gives a job


def of_hydra() -> Here:
    """The job that Hydra runs in this process now."""
    from hydra.core.hydra_config import HydraConfig

    config = HydraConfig.get()
    overrides, folder = list(config.overrides.task), Path(config.runtime.output_dir)
    if str(config.mode) != "RunMode.MULTIRUN":
        return Here(folder, overrides)
    launcher = config.launcher
    cores = launcher.get("num_cpus") or launcher.get("cpus_per_task")  # as Ray and submitit call them
    return Here(folder, overrides, int(config.job.num), Path(config.sweep.dir), at_once(launcher), cores)


def at_once(launcher: Any) -> int:
    """The jobs that a launcher runs on one machine.

    joblib's setting: a number, or -1 for as many as there are cores, -2 for one less.
    """
    asked = int(launcher.get("n_jobs") or 1)
    cores = machine.bound_cores()
    return max(1, asked if asked > 0 else cores + 1 + asked)


def combinations(command: Command) -> list[list[str]]:
    """The jobs of a sweep in the order in which Hydra's own sweeper makes them, none known where another chooses."""
    hydra = _hydra_node(command)
    if (found := search(command)) is not None:
        return [[]] * found.settings.trials
    if hydra is not None and not str(hydra.sweeper._target_).endswith(".BasicSweeper"):
        return []
    own = [text for text in _with_params(command.overrides, hydra) if not text.startswith(("hydra.", "hydra/"))]
    choices = [[text] if (override := _parsed(text)) is None else _values(override) for text in own]
    return [list(chosen) for chosen in itertools.product(*choices)]


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search, as a command asks for it."""

    settings: SearchSettings
    space: Space
    prunes: bool  # there is a limit that a job may break early, and nothing else was asked for then


def search(command: Command) -> Searched | None:
    """The search that the sweep `command` is, if it is one. Raises RecipeError for what is wrong with it."""
    hydra = _hydra_node(command) if command.is_sweep else None
    if hydra is None or not _is_search(hydra):
        return None
    settings = {str(key): value for key, value in hydra.sweeper.items() if key != "_target_"}
    config = composed(_first_values(command.overrides), command, whole=True)
    return searched(settings, command.overrides, config, command.subject)


def _is_search(hydra: DictConfig | None) -> bool:
    return hydra is not None and hydra.sweeper._target_ == SEARCH


def searched(settings: Any, overrides: Sequence[str], config: DictConfig, subject: str = "this search") -> Searched:
    """The search that `settings` of hydra.sweeper ask for. config: one of its jobs', or with their first values.

    Raises RecipeError for what is wrong with it.
    """
    problems: list[str] = []
    found: SearchSettings | None = _typed(SearchSettings, OmegaConf.create(settings), "hydra.sweeper", problems)
    fixed, dimensions = [], []
    own = [
        text for text in _with_params(overrides, settings.get("params")) if not text.startswith(("hydra.", "hydra/"))
    ]
    for text in own:
        override = _parsed(text)
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


def _with_params(overrides: Sequence[str], hydra: Any) -> list[str]:
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


def _sweep_combinations(overrides: Sequence[str], ends: bool = False) -> Iterator[list[str]]:
    """The first value of every swept override together, then each of the others beside the first of the rest.

    ends: of numbers the lowest and the highest stand for all.
    """
    choices = [[text] if (override := _parsed(text)) is None else _values(override, ends) for text in overrides]
    first = [values[0] for values in choices]
    yield first
    for i, values in enumerate(choices):
        for value in values[1:]:
            yield [*first[:i], value, *first[i + 1 :]]


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None  # composing it says what is wrong


def _values(override: Override, ends: bool = False) -> list[str]:
    """The values of what is swept, of an interval its ends; the words themselves of what is not."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    key = (override.input_line or "").split("=")[0]
    try:
        if ends and override.is_range_sweep():
            return [f"{key}={value}" for value in dict.fromkeys(_dimension(override).ends)]
        if isinstance(interval := override.value(), IntervalSweep):
            return [f"{key}={interval.start}", f"{key}={interval.end}"]
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError):
        return [f"{key}={override.value()}"]


def recipe_of(overrides: Sequence[str], command: Command) -> str:
    """The body of a plain recipe that composes to what `overrides` do: options of groups, and what differs in them."""
    config = composed(overrides, command, whole=True)
    chosen = {str(key): str(value) for key, value in config.hydra.runtime.choices.items()}
    plain = composed([], command, whole=True)
    known = {str(key): str(value) for key, value in plain.hydra.runtime.choices.items()}
    found = plan(_without_hydra(config), recipe=command.recipe, overrides=overrides, subject=command.subject)
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


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


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


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Compose although another Hydra application may be running; leave its global state as it was."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = before


def plan(config: DictConfig, *, recipe: str, overrides: Sequence[str], subject: str, command: str = "") -> Plan:
    """The checked Plan of a composed configuration. Raises RecipeError with every problem that it has.

    command: what repeats the run, for its report.
    """
    problems = _unknown_nodes(config)
    settings = {name: _typed(schema, config.get(name), name, problems) for name, schema in SCHEMAS.items()}
    seed = _scalar(config, "seed", int, problems)
    dry_run = _scalar(config, "dry_run", bool, problems)
    device = _device(str(config.get("device")), problems)
    rehearse = _rehearse(config.get("rehearse"), problems)
    entries = _entries(config, problems)
    relax = _relaxed(config, entries, problems)
    if "goal" in config and not any(value is not None for value in config.goal.values()):
        problems.append("goal is empty; give at least one limit, for example goal.p50_ms=5 goal.quality_drop=0.01")
    form = settings["model"].form if settings["model"] else "torch"
    if settings["target"]:
        entries = _without_absent(entries, settings["target"], problems)
    if not problems:
        problems += chain_problems(entries, form)
    if not problems and entries:
        problems += _target_problems(entries, relax, settings["target"], form)
    if not problems:
        runtime = settings["target"].runtime
        problems += budget_problems(entries, settings["budget"], settings["measure"], relax, runtime, form)
    if settings["model"] and settings["data"]:
        problems += sources.problems(settings["model"], settings["data"])
    if problems:
        raise RecipeError(problems, subject)
    return Plan(
        recipe=recipe,
        overrides=list(overrides),
        entries=tuple(entries),
        target=settings["target"],
        budget=settings["budget"],
        measure=settings["measure"],
        tracking=settings["tracking"],
        store=settings["store"],
        model=settings["model"],
        data=settings["data"],
        seed=seed,
        device=device,
        dry_run=dry_run,
        relax=relax,
        config=_used(config, entries, recipe),
        command=command,
        rehearse=rehearse,
    )


def _typed(schema: type, node: Any, name: str, problems: list[str]) -> Any:
    """`node` as an instance of its dataclass, or None and a problem."""
    try:
        plain = OmegaConf.to_container(node, resolve=True, enum_to_str=True) if OmegaConf.is_config(node) else node
        value = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except ValueError as error:
        problems.append(f"{name}: {reason(error)}")
    except OmegaConfBaseException as error:
        problems.append(f"{name}: {reason(error)}")
    else:
        return value
    return None


def _scalar(config: DictConfig, name: str, kind: type[T], problems: list[str]) -> T:
    value = config.get(name)
    if type(value) is not kind:
        problems.append(f"{name} is {value!r}; it must be of type {kind.__name__}")
        return kind()
    return value


def _device(device: str, problems: list[str]) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        problems.append(f"device is '{device}'; it must be auto, cpu, cuda or cuda:<number>")
    return device


def _rehearse(asked: Any, problems: list[str]) -> bool | None:
    """Whether to rehearse; None leaves it to the pipeline."""
    if asked != "auto" and not isinstance(asked, bool):
        problems.append(f"rehearse is {asked!r}; it must be auto, true or false")
    return asked if isinstance(asked, bool) else None


def _unknown_nodes(config: DictConfig) -> list[str]:
    """Top-level keys that are neither a setting nor a stage: `+prune_more=channels` would store a string."""
    problems = []
    for key in map(str, config):
        node = OmegaConf.get_type(config, key)
        if key in SCHEMAS or key in SETTINGS or registry.info_of(node) if isinstance(node, type) else key in SETTINGS:
            continue
        value = config.get(key)
        family = next((family for family in registry.families() if key.startswith(family)), None)
        if isinstance(value, str) and family:
            problems.append(f"'{key}={value}' only stores a word; did you mean '+{family}@{key}={value}'?")
        elif key != "recipe":
            known = sorted({*SCHEMAS, *SETTINGS, *registry.families()})
            problems.append(f"there is no setting '{key}'{did_you_mean(key, known)}")
    return problems


def _entries(config: DictConfig, problems: list[str]) -> list[Entry]:
    """The pipeline's steps and choices."""
    listed = config.get("pipeline")
    if not OmegaConf.is_list(listed):
        problems.append(
            f"pipeline is {listed!r}; it must be a list of stage keys, for example [quantize, trace, export]"
        )
        return []
    if not listed:
        problems.append("pipeline is empty; it must list at least one stage key")
    steps = _Steps(config, problems)
    plain = OmegaConf.to_container(listed)
    assert isinstance(plain, list)
    entries = [steps.entry(item) for item in plain]
    repeated = sorted({key for key in steps.used if steps.used.count(key) > 1})
    problems += [f"pipeline names '{key}' twice; a family runs twice as +{key}@{key}_again=…" for key in repeated]
    return [entry for entry in entries if entry is not None]


class _Steps:
    """Turns the items of `pipeline` into entries, collecting problems."""

    def __init__(self, config: DictConfig, problems: list[str]) -> None:
        self.config, self.problems = config, problems
        self.used: list[str] = []

    def entry(self, item: Any) -> Entry | None:
        if isinstance(item, str):
            self.used.append(item)
            return self.step(item)
        if isinstance(item, dict) and len(item) == 1:
            how, branches = next(iter(item.items()))
            if how in ("first_of", "best_of") and isinstance(branches, list) and len(branches) > 1:
                return self.choice(how, branches)
        self.problems.append(
            f"pipeline holds {item!r}; an entry is a stage key, {{first_of: [a, b]}} or {{best_of: [a, b]}}"
        )
        return None

    def choice(self, how: Any, branches: list[Any]) -> Choice | None:
        keys = [branch if isinstance(branch, list) else [branch] for branch in branches]
        if not all(keys):
            self.problems.append(f"{how} holds an empty alternative; each names at least one stage key")
        built = [[self.step(key) for key in branch] for branch in keys]
        if any(step is None for branch in built for step in branch) or not all(built):
            return None
        return Choice(how, tuple(tuple(step for step in branch if step) for branch in built))

    def step(self, key: Any) -> Step | None:
        kind = OmegaConf.get_type(self.config, key) if isinstance(key, str) and key in self.config else None
        info = registry.info_of(kind) if isinstance(kind, type) else None
        if info is None:
            known = [str(k) for k in self.config if registry.info_of(OmegaConf.get_type(self.config, str(k)) or object)]
            hint = did_you_mean(str(key), known) or f"; there are {', '.join(known)}"
            self.problems.append(f"pipeline names '{key}', which has no settings{hint}")
            return None
        node = self.config[key]
        fields = [field.name for field in dataclasses.fields(info.cls)]
        unknown = [str(name) for name in node if name not in fields]
        self.problems += [f"{key}: {info.name} has no setting '{n}'{did_you_mean(n, fields)}" for n in unknown]
        try:
            stage: Any = OmegaConf.to_object(node)
        except (ValueError, OmegaConfBaseException) as error:
            self.problems.append(f"{key}: {reason(error)}")
            return None
        return Step(key, stage, info)


def _relaxed(config: DictConfig, entries: list[Entry], problems: list[str]) -> dict[str, list[Step]]:
    """The milder steps that `relax` lists. What it varies is put in words, in the pipeline's own steps too."""
    listed = OmegaConf.to_container(config.get("relax") or OmegaConf.create({}))
    if not isinstance(listed, dict):
        problems.append(
            f"relax is {listed!r}; it lists milder settings by step, for example {{prune: [{{ratio: 0.3}}]}}"
        )
        return {}
    keys = [entry.key if isinstance(entry, Step) else "" for entry in entries]
    relax: dict[str, list[Step]] = {}
    for key, milder in ((str(key), milder) for key, milder in listed.items()):
        if not key or key not in keys:
            inside = any(key in entry.key for entry in entries if isinstance(entry, Choice))
            hint = "; what stands inside an alternative cannot be relaxed" if inside else did_you_mean(key, keys)
            problems.append(f"relax names '{key}', which is no step of the pipeline{hint}")
        elif not (isinstance(milder, list) and milder and all(isinstance(item, dict) and item for item in milder)):
            problems.append(f"relax.{key} is {milder!r}; it must list settings, for example [{{ratio: 0.3}}]")
        else:
            steps = [_milder(config, key, settings, problems) for settings in milder]
            relax[key] = [step for step in steps if step]
            own_step = entries[keys.index(key)]
            assert isinstance(own_step, Step)
            varied = sorted({name for settings in milder for name in settings})
            own = ", ".join(f"{name}={OmegaConf.select(config, f'{key}.{name}')}" for name in varied)
            entries[keys.index(key)] = replace(own_step, settings=own)
    return relax


def _milder(config: DictConfig, key: str, settings: dict[str, Any], problems: list[str]) -> Step | None:
    """The step `key` with `settings` in place of its own."""
    found: list[str] = []
    step = None
    try:
        changed = OmegaConf.merge(config, {key: settings})
        assert isinstance(changed, DictConfig)
        step = _Steps(changed, found).step(key)
    except OmegaConfBaseException as error:
        found.append(reason(error))
    problems += [f"relax.{key}: {problem}" for problem in found]
    return replace(step, settings=", ".join(f"{name}={value}" for name, value in settings.items())) if step else None


def _target_problems(entries: Sequence[Entry], relax: dict[str, list[Step]], target: Target, form: str) -> list[str]:
    if target.runtime not in RUNTIMES:
        hint = did_you_mean(target.runtime, RUNTIMES)
        return [f"target.runtime is '{target.runtime}'{hint or '; it must be one of ' + ', '.join(RUNTIMES)}"]
    if missing(target.runtime):
        return [f'target.runtime={target.runtime} is not installed here; pip install "optpipe[{target.runtime}]"']
    settings = target.device, target.threads, target.options
    if problems := machine.device_problems(target.device) or setting_problems(target.runtime, *settings):
        return problems
    files = forms_along(entries, form)[-1][2] - {"torch", "program"}
    if files and not files & set(RUNTIMES[target.runtime]):
        able = [name for name in RUNTIMES if files & set(RUNTIMES[name])]
        return [
            f"the pipeline ends with {spoken(files)}, which target.runtime={target.runtime} does not run; set "
            f"target.runtime={' or '.join(able)}"
        ]
    if absent := [name for name in sorted(files) if not installed_for(name)]:
        return [f"nothing that runs {spoken(absent)} is installed here"]
    steps = [*(entry for entry in entries if isinstance(entry, Step)), *itertools.chain(*relax.values())]
    return list(dict.fromkeys(problem for step in steps for problem in _unmet(step, target)))


def _unmet(step: Step, target: Target) -> list[str]:
    """Why `step` cannot run here, or for `target`."""
    if missing := step.info.missing():
        remedy = f'pip install "{step.info.extra}"' if step.info.extra else f"pip install {' '.join(missing)}"
        return [f"stage '{step.info.name}' needs {', '.join(missing)}, not installed here; {remedy}"]
    return [f"{step.key}: {problem}" for problem in registry.problems_of(step.stage, target)]


def _without_absent(entries: Sequence[Entry], target: Target, problems: list[str]) -> list[Entry]:
    """`entries` without alternatives that cannot run here; a problem for a choice that has no other."""
    kept: list[Entry] = []
    for entry in entries:
        if isinstance(entry, Choice):
            reasons = ["; ".join(p for step in branch for p in _unmet(step, target)) for branch in entry.branches]
            able = tuple(branch for branch, reason in zip(entry.branches, reasons, strict=True) if not reason)
            absent = [(method_of(b), reason) for b, reason in zip(entry.branches, reasons, strict=True) if reason]
            if not able:
                problems += dict.fromkeys(reason for _, reason in absent)
            entry = replace(entry, branches=able or entry.branches, absent=tuple(absent))
        kept.append(entry)
    return kept


def _used(config: DictConfig, entries: Sequence[Entry], recipe: str) -> dict[str, Any]:
    """The resolved configuration without the families that the pipeline does not use."""
    kept = {*SCHEMAS, *SETTINGS, *(step.key for step in steps_of(entries))}
    plain = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {"recipe": recipe, **{str(key): value for key, value in plain.items() if key in kept}}

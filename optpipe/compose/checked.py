"""A composed configuration to a checked Plan, with every problem that it has."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optpipe import machine, registry, sources
from optpipe.compose.groups import SCHEMAS, SETTINGS
from optpipe.errors import RecipeError, did_you_mean, reason
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
from optpipe.target import Target

T = TypeVar("T")


def plan(config: DictConfig, *, recipe: str, overrides: Sequence[str], subject: str, command: str = "") -> Plan:
    """The checked Plan of a composed configuration. Raises RecipeError with every problem that it has.

    command: what repeats the run, for its report.
    """
    problems = _unknown_nodes(config)
    settings = {name: typed(schema, config.get(name), name, problems) for name, schema in SCHEMAS.items()}
    seed = _scalar(config, "seed", int, problems)
    dry_run = _scalar(config, "dry_run", bool, problems)
    device = _device(str(config.get("device")), problems)
    rehearse = _rehearse(config.get("rehearse"), problems)
    entries = _entries(config, problems)
    relax = _relaxed(config, entries, problems)
    goal = config.get("goal", {})
    if "goal" in config and not (isinstance(goal, DictConfig) and any(value is not None for value in goal.values())):
        said = "empty" if isinstance(goal, DictConfig) or not goal else f"'{goal}'"
        problems.append(f"goal is {said}; give at least one limit, for example goal.p50_ms=5 goal.quality_drop=0.01")
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


def typed(schema: type, node: Any, name: str, problems: list[str]) -> Any:
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

"""`@register` turns a dataclass into a stage: a config group option, its own schema and the contract of its forms."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hydra.core.config_store import ConfigStore

if TYPE_CHECKING:
    from optpipe.context import Context
    from optpipe.target import Target

ENTRY_POINT_GROUP = "optpipe.stages"


class Stage(Protocol):
    """What every registered dataclass has. Its fields are its settings.

    It may have two more methods. `problems(target) -> list[str]`: why it cannot run for a target, or with what this
    machine has, in words that name the remedy; they are reported before any work starts. `gives() -> tuple[str, ...]`:
    the forms that it may give, where that depends on its settings.
    """

    def run(self, model: Any, ctx: Context) -> Any: ...


S = TypeVar("S", bound=type)


@dataclass(frozen=True)
class StageInfo:
    """What a registered class said of itself."""

    name: str  # "prune/channels": config group and option
    cls: type
    takes: tuple[str, ...]  # the forms it accepts
    gives: str  # the form it returns, or "same"
    requires: tuple[str, ...]  # importable modules that it needs
    extra: str | None  # the extra of its distribution that installs them
    compiles: bool  # what it gives runs on such machines alone as the one that made it
    needs_recovery: bool  # what it gives must be trained again before limits on quality mean something

    def missing(self) -> list[str]:
        """The modules in `requires` that cannot be imported here."""
        return [name for name in self.requires if importlib.util.find_spec(name.partition(".")[0]) is None]


_by_class: dict[type, StageInfo] = {}


def register(
    name: str,
    *,
    takes: str | Sequence[str],
    gives: str,
    requires: Sequence[str] = (),
    extra: str | None = None,
    compiles: bool = False,
    needs_recovery: bool = False,
) -> Callable[[S], S]:
    """Register a dataclass with `run(model, ctx)` as the stage `name`, "group/option".

    takes: the form, or forms, that `run` accepts: "torch", "program", "onnx", …
    gives: the form that `run` returns; "same" if it passes the form through.
    requires: modules that `run` imports beyond optpipe's own dependencies; checked before a run starts.
    extra: what to `pip install` when one of them is missing, for example "optpipe[openvino]".
    compiles: whether what `run` gives is compiled for this machine; the store then gives it to no other.
    needs_recovery: whether the model must be trained again afterwards; the budget then judges quality after the step
        behind it.

    Raises TypeError for a class that is no dataclass or has no `run`, ValueError for a name that is taken.
    """
    group, _, option = name.partition("/")
    if not group or not option:
        raise ValueError(f"register({name!r}): a stage's name is 'group/option', for example 'prune/channels'")

    def decorate(cls: S) -> S:
        if not dataclasses.is_dataclass(cls) or not callable(getattr(cls, "run", None)):
            raise TypeError(f"register({name!r}): {cls.__name__} must be a dataclass with a method run(model, ctx)")
        taken = next((info for info in _by_class.values() if info.name == name), None)
        if taken and taken.cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"register({name!r}): {taken.cls.__module__}.{taken.cls.__qualname__} has this name")
        forms = (takes,) if isinstance(takes, str) else tuple(takes)
        if taken:  # a module that is reloaded in a notebook registers its classes again
            del _by_class[taken.cls]
        _by_class[cls] = StageInfo(name, cls, forms, gives, tuple(requires), extra, compiles, needs_recovery)
        ConfigStore.instance().store(group=group, name=option, node=cls, provider=cls.__module__)
        return cls

    return decorate


def store_schema(name: str, schema: type) -> None:
    """Make `schema` the type of the config node `name` (see the defaults list in conf/config.yaml)."""
    ConfigStore.instance().store(group="schema", name=name, node=schema, provider="optpipe")


def load_stages() -> None:
    """Import the stages of every installed distribution that has the entry point `optpipe.stages`."""
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        entry_point.load()


def load_plugins(modules: Sequence[str]) -> list[str]:
    """Import the user's modules that register stages; return one problem for each that cannot be imported."""
    problems = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a plug-in is the user's code: whatever it raises is theirs to read
            problems.append(f"plugins names '{module}', which cannot be imported ({type(error).__name__}: {error})")
    return problems


def info_of(cls: type) -> StageInfo | None:
    """What `cls` registered, or None if it is no stage."""
    return _by_class.get(cls)


def problems_of(stage: Stage, target: Target) -> list[str]:
    """Why `stage` cannot run for `target`, if it says so."""
    asked = getattr(stage, "problems", None)
    return list(asked(target)) if callable(asked) else []


def gives_of(stage: Stage, info: StageInfo) -> tuple[str, ...]:
    """The forms that `stage` may give; "same" is the one that it takes."""
    asked = getattr(stage, "gives", None)
    return tuple(asked()) if callable(asked) else (info.gives,)


def stages() -> list[StageInfo]:
    """Every registered stage, by name."""
    return sorted(_by_class.values(), key=lambda info: info.name)


def families() -> dict[str, list[str]]:
    """Every stage family with its options."""
    table: dict[str, list[str]] = {}
    for info in stages():
        group, _, option = info.name.partition("/")
        table.setdefault(group, []).append(option)
    return table

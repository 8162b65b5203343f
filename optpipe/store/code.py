"""What code a class or function is: a hash over its module and all that this imports of its own project.

A change of a comment counts as a change, so that what is said to be the same is the same. Of other distributions the
version stands for the code; of optpipe all of its own sources do.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optpipe.errors import OptpipeError

OPTPIPE = __package__.partition(".")[0]
BEGUN = time.time()  # what was written later may not be what runs
DEPTH = 8  # of objects in objects
ELSEWHERE = tuple(
    Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
TYPE_CHECKING = re.compile(r"^if (?:typing\.)?TYPE_CHECKING:\n(?:[ \t]+.*\n|\n)+", re.MULTILINE)
IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n#]+)", re.MULTILINE)
FROM_IMPORT = re.compile(r"^[ \t]*from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]+)", re.MULTILINE)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class UnknownCode(OptpipeError):
    """Something whose code cannot be identified, so that no result of it can be used again."""


def code_of(thing: type | types.FunctionType) -> str:
    """Sha256 of the code that a class or function may run. Raises UnknownCode where that cannot be known.

    A function may be a lambda or hold variables of the function around it; their values are part of it.
    """
    name = f"{thing.__module__}.{thing.__qualname__}"
    if isinstance(thing, type) and "<locals>" in thing.__qualname__:
        raise UnknownCode(f"class {name} is defined inside a function; define it in its module")
    digest = hashlib.sha256(f"{name} {code_of_module(thing.__module__)}".encode())
    if isinstance(thing, types.FunctionType):
        code = thing.__code__  # of two lambdas in one function the names are equal
        digest.update(
            repr((code.co_code, code.co_names, [str(part) for part in code.co_consts if _plain(part)])).encode()
        )
        for cell in thing.__closure__ or ():
            digest.update(value_of(cell.cell_contents, f"a variable of {name}").encode())
        for default in (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()):
            digest.update(value_of(default, f"a default of {name}").encode())
    return digest.hexdigest()


def value_of(value: Any, what: str, depth: int = DEPTH) -> str:
    """`value` in words that are the same for the same value in every process. Raises UnknownCode where it has none.

    A string that names importable code stands for that code too, and one that names a file for its content.
    what: how to speak of it in that error.
    """
    if isinstance(value, str):
        return f"{value!r}{_named_by(value)}"
    if value is None or isinstance(value, (bool, int, float, complex, bytes, range, slice)):
        return repr(value)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, Path):
        return value_of(str(value), what, depth)
    if isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _array(torch.as_tensor(value))
    if isinstance(value, Mapping):
        parts = (f"{value_of(key, what, depth)}: {value_of(item, what, depth)}" for key, item in value.items())
        return f"{{{', '.join(parts)}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(value_of(item, what, depth) for item in value))}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(value_of(item, what, depth) for item in value)}]"
    if isinstance(value, (type, types.FunctionType)):
        return code_of(value)
    if isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
        return value.__name__
    if isinstance(value, functools.partial):
        return value_of([value.func, list(value.args), value.keywords], what, depth)
    if isinstance(value, types.MethodType):
        return value_of([value.__func__, value.__self__], what, depth)
    if is_dataclass(value) and not isinstance(value, type):
        held = {item.name: getattr(value, item.name) for item in fields(value)}
        return f"{code_of(type(value))} {value_of(held, what, depth)}"
    if isinstance(value, torch.nn.Module):
        from optpipe.forms.torch import content_hash

        return f"{code_of_modules(value)} {content_hash(value)}"
    if depth and hasattr(value, "__dict__") and not isinstance(value, (types.GeneratorType, types.CodeType)):
        held = {name: value_of(part, f"{what}.{name}", depth - 1) for name, part in sorted(vars(value).items())}
        return f"{code_of(type(value))} {held}"
    raise UnknownCode(
        f"{what} is of type {type(value).__module__}.{type(value).__qualname__}, which cannot be compared"
    )


def code_of_modules(model: torch.nn.Module) -> str:
    """Sha256 of the code of every class in the tree of `model`. Raises UnknownCode, also for what a module holds."""
    found = {type(module) for module in model.modules() if not isinstance(module, torch.fx.GraphModule)}
    own = sorted(code_of(cls) for cls in found if not cls.__module__.startswith("torch."))
    for name, module in model.named_modules():
        attributes(module, name)
    return hashlib.sha256(" ".join(own).encode()).hexdigest()


OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))


def attributes(module: torch.nn.Module, name: str, *, strict: bool = True) -> str:
    """What a module holds beside parameters, buffers and modules, in words. Raises UnknownCode where it is `strict`.

    A graph's is its code. What torch's own modules keep to themselves follows from what they show.
    """
    if isinstance(module, torch.fx.GraphModule):
        return ""
    is_torchs = type(module).__module__.startswith("torch.")
    found = []
    for key, value in sorted(vars(module).items()):
        if key in OF_EVERY_MODULE or (is_torchs and key.startswith("_")):
            continue
        try:
            found.append(f"{key}={value_of(value, f'{name or type(module).__name__}.{key}')}")
        except (UnknownCode, RecursionError) as error:
            if strict:
                raise UnknownCode(str(error)) from error
            found.append(f"{key}: {type(value).__qualname__}")
    return ", ".join(found)


def _plain(constant: Any) -> bool:
    return not isinstance(constant, types.CodeType)


def _array(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


def _named_by(text: str) -> str:
    """What the string `text` names: the code of a dotted path, the content of a file, or nothing."""
    if DOTTED.fullmatch(text):
        module = text.rpartition(".")[0]
        try:
            known = module in sys.modules or importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):  # the first part is no package
            known = False
        return f" {code_of_module(module)}" if known else ""
    if len(text) < 4096 and "\0" not in text and (path := Path(text)).is_file():
        with path.open("rb") as file:
            return f" {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return ""


def code_of_module(name: str) -> str:
    """Sha256 over a module, its project's modules that it imports, and the versions of other distributions'.

    Raises UnknownCode for a module without a file, as in a notebook.
    """
    if _file(name) is None and not _is_elsewhere(name):
        raise UnknownCode(f"module '{name}' has no file, so that its code cannot be identified; put it into a file")
    return _closure(name)


@functools.cache
def _closure(name: str) -> str:
    digest, todo, seen = hashlib.sha256(), [name], {name}
    parts: list[str] = []
    while todo:
        module = todo.pop()
        file = _file(module)
        if file is None or _is_elsewhere(module):
            parts.append(f"{module.partition('.')[0]} {_version(module.partition('.')[0])}")
            continue
        if file.stat().st_mtime > BEGUN:
            raise UnknownCode(f"{file} was changed while this process ran, so that it may run what is no longer there")
        text = file.read_text(errors="replace")
        parts.append(f"{module} {hashlib.sha256(text.encode()).hexdigest()}")
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for other in _imports(TYPE_CHECKING.sub("", text), package):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    digest.update("\n".join(sorted(set(parts))).encode())
    return digest.hexdigest()


def _imports(text: str, package: str) -> Iterator[str]:
    """The modules that `text`, of a module in `package`, imports; of others' distributions only the first part."""
    names = [part.split(" as ")[0].strip() for found in IMPORT.findall(text) for part in found.split(",")]
    for origin, listed in FROM_IMPORT.findall(text):
        dots = len(origin) - len(origin.lstrip("."))
        above = package.split(".")[: len(package.split(".")) - dots + 1] if dots else []
        module = ".".join([*above, *filter(None, [origin.lstrip(".")])])
        names.append(module)
        if not _is_elsewhere(module) and _file(module):  # in this order: to find a submodule imports its package
            members = (part.split(" as ")[0].strip() for part in re.sub(r"#.*", "", listed.strip("()")).split(","))
            names += [f"{module}.{member}" for member in members if member and _file(f"{module}.{member}")]
    for name in names:
        if re.fullmatch(r"[\w.]+", name):
            yield name.partition(".")[0] if _is_elsewhere(name) or _file(name) is None else name


@functools.cache
def _file(name: str) -> Path | None:
    """The source of a module, found without running it where that is possible."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        found = getattr(loaded, "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        found = spec.origin if spec else None
    path = Path(found) if found else None
    return path.resolve() if path and path.suffix == ".py" and path.exists() else None


@functools.cache
def _is_elsewhere(name: str) -> bool:
    """Whether a module is of the standard library, optpipe, or a distribution whose version tells its code."""
    top = name.partition(".")[0]
    if top == OPTPIPE:
        return True
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return True
    file = _file(top) or (_file(name) if _is_namespace(top) else None)
    if file is None:
        return top in sys.modules and inspect.ismodule(sys.modules[top]) and _version(top) != "unknown"
    return any(file.is_relative_to(folder) for folder in ELSEWHERE)


def versions_of(modules: Sequence[str]) -> dict[str, str]:
    """Of the distributions that hold these modules."""
    return {module: _version(module.partition(".")[0]) for module in modules}


@functools.cache
def _version(top: str) -> str:
    if top in sys.stdlib_module_names:
        return sys.version.split()[0]
    if top == OPTPIPE:
        return code_of_optpipe()
    try:
        return version(top.replace("_", "-"))
    except PackageNotFoundError:
        names = packages_distributions().get(top, [])  # scikit-learn is imported as sklearn
        return " ".join(f"{name} {version(name)}" for name in names) or "unknown"


def _is_namespace(top: str) -> bool:
    """Whether a package has no file of its own, so that its modules may lie anywhere."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is None and spec.submodule_search_locations is not None


@functools.cache
def code_of_optpipe() -> str:
    """Sha256 over the sources of optpipe and its stages: engines and forms are imported by their names."""
    digest = hashlib.sha256()
    for package in (OPTPIPE, f"{OPTPIPE}.stages"):
        root = (_file(package) or Path(__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return digest.hexdigest()

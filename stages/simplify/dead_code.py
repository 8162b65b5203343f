"""Dead code: weights that no forward pass reads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from torch import jit, nn

from optpipe.errors import named_reason

from .flow import Flow
from .trials import Rewrite, Trials

UNUSED = "Unused weights"


def drop_unused(trials: Trials, flow: Flow) -> list[Rewrite]:
    """Drop modules that never run, and parameters that nothing reads: an identity or None takes their place.

    Kept are those that a pass in training mode reads, and all of them if the model looks at values on its way, since
    other inputs may then take another way through it.
    """
    model = trials.model
    dead = list(_dead(model, _read(model, flow), flow))
    if not dead:
        return []
    reason = ""
    if flow.looks:
        reason = f"the model looks at values ({', '.join(flow.looks)}): other inputs may take a way that needs them"
    trained, failed = _read_in_training(model, trials) if not reason else (set[str](), "")
    rewrites = []
    for name, tensors, change in dead:
        why = reason or failed or ("it is read while the model is trained" if trained & set(tensors) else "")
        if why:
            trials.refuse(UNUSED, (name,), why)
        else:
            rewrites.append(Rewrite(UNUSED, (name,), change))
    return trials.make(rewrites)


def _dead(
    model: nn.Module, read: set[str], flow: Flow, prefix: str = ""
) -> Iterator[tuple[str, list[str], Callable[[], None]]]:
    """(name, the names of its parameters, what takes it out) of the largest modules and parameters that are unused."""
    owner = model.get_submodule(prefix.removesuffix("."))
    for child, module in owner.named_children():
        name = f"{prefix}{child}"
        names = [tensor for tensor, _ in module.named_parameters(name, remove_duplicate=False)]
        ran = any(flow.calls(inner) for inner, _ in module.named_modules(prefix=name))
        if names and not ran and not isinstance(module, jit.ScriptModule) and not read & set(names):
            yield name, names, _emptied(model, name)
        else:
            yield from _dead(model, read, flow, f"{name}.")
    if not type(owner).__module__.startswith("torch."):  # which read what they hold
        for parameter in [parameter for parameter, value in owner._parameters.items() if value is not None]:
            if f"{prefix}{parameter}" not in read:
                yield f"{prefix}{parameter}", [f"{prefix}{parameter}"], _cleared(owner, parameter)


def _emptied(model: nn.Module, name: str) -> Callable[[], None]:
    return lambda: model.set_submodule(name, nn.Identity())


def _cleared(owner: nn.Module, parameter: str) -> Callable[[], None]:
    return lambda: setattr(owner, parameter, None)


def _read_in_training(model: nn.Module, trials: Trials) -> tuple[set[str], str]:
    """The parameters that a pass in training mode reads, and why that cannot be told."""
    try:
        trained = copy.deepcopy(model).train()
        return _read(trained, Flow.of(trained, trials.batches[-1:])), ""
    except Exception as error:  # whatever the user's forward raises
        return set(), f"a pass in training mode, which might need it, fails ({named_reason(error)})"


def _read(model: nn.Module, flow: Flow) -> set[str]:
    """The parameters that a function was given, under all names of those that modules share."""
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if flow.reads(tensor)}

"""Gradient checkpointing: modules that forget what they computed and compute it again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from optpipe.patterns import matching


@contextmanager
def recomputed(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """Within this, the modules that `patterns` name trade time for memory (Chen et al. 2016); results are the same.

    Raises StageError for a pattern that names none.
    """
    chosen = _outermost(model, patterns)
    for module in chosen:
        module.forward = functools.partial(
            checkpoint, module.forward, use_reentrant=False, context_fn=functools.partial(_contexts, module)
        )
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _outermost(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules that match, without those inside another one."""
    names = [name for name, _ in model.named_modules() if name]
    found = matching(names, patterns, "checkpointing")
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return [model.get_submodule(name) for name in outer]


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _counted_once(module)


@contextmanager
def _counted_once(module: nn.Module) -> Iterator[None]:
    """The second computation leaves the running statistics of batch norm alone: the first has seen the batch."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    before = [
        (norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and tracked is not None:
                norm.num_batches_tracked.copy_(tracked)

"""hydra/sweeper=once: Hydra's own sweeper, which composes once what jobs have in common.

Hydra composes every job to check it before the first one starts, and again to start it. optpipe takes this sweeper in
the place of hydra/sweeper=basic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

KEPT = 200  # configurations of some hundred KB


class Once(BasicSweeper):  # type: ignore[misc]
    """Composes a job from another one where they differ in plain values alone."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        loader: Any = _Composed(hydra_context.config_loader)
        once = HydraContext(config_loader=loader, callbacks=hydra_context.callbacks)
        super().setup(hydra_context=once, task_function=task_function, config=config)


class _Composed:
    """A ConfigLoader that remembers what it composed."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._known: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        from optpipe.compose.compositions import changes

        for known, config in self._known.items():
            changed = changes(known, sweep_overrides)
            if changed is not None:
                found = _changed(config, sweep_overrides, changed)
                OmegaConf.copy_cache(from_config=master_config, to_config=found)
                return found
        composed: DictConfig = self._loader.load_sweep_config(master_config, list(sweep_overrides))
        if len(self._known) < KEPT:
            self._known[tuple(sweep_overrides)] = composed.copy()
        return composed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __reduce__(self) -> Any:  # other processes, to which joblib and Ray send it, compose for themselves
        return _Composed, (self._loader,)


def _changed(config: DictConfig, overrides: Sequence[str], changed: Sequence[Override]) -> DictConfig:
    """A copy of `config` with other values, and what Hydra says of them in its own node."""
    from optpipe.compose.compositions import parsed

    found = config.copy()
    for override in changed:
        OmegaConf.update(found, override.key_or_group, override.value(), merge=True)
    said = [override for override in map(parsed, overrides) if override and not override.is_hydra_override()]
    found.hydra.overrides.task = [override.input_line for override in said]
    found.hydra.job.override_dirname = get_overrides_dirname(said, **found.hydra.job.config.override_dirname)
    return found

"""hydra/sweeper=once: Hydra's own sweeper, with each job composed once instead of twice.

Hydra composes every job to check it before the first one starts, and again to start it. optpipe takes this sweeper in
the place of hydra/sweeper=basic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

KEPT = 200  # configurations of some hundred KB


class Once(BasicSweeper):  # type: ignore[misc]
    """Hands over to the launcher what was composed to be checked."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        loader: Any = _Composed(hydra_context.config_loader)
        once = HydraContext(config_loader=loader, callbacks=hydra_context.callbacks)
        super().setup(hydra_context=once, task_function=task_function, config=config)


class _Composed:
    """A ConfigLoader that keeps the configuration of a job until it is asked for again."""

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._kept: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        job = tuple(sweep_overrides)
        if job in self._kept:
            return self._kept.pop(job)
        config: DictConfig = self._loader.load_sweep_config(master_config, list(sweep_overrides))
        if len(self._kept) < KEPT:
            self._kept[job] = config
        return config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __reduce__(self) -> Any:  # other processes, to which joblib and Ray send it, compose for themselves
        return _Composed, (self._loader,)

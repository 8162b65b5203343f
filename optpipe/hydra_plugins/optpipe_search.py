"""hydra/sweeper=search: Hydra's side of a search. It lies where Hydra looks for plug-ins, and imports when used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


class Search(Sweeper):  # type: ignore[misc]
    """Lets optpipe.search choose the jobs, and hands them to the launcher."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from optpipe import compose
        from optpipe.errors import RecipeError
        from optpipe.search import study

        self.folder = Path(self.config.hydra.sweep.dir)
        found = compose.searched(self.settings, arguments, self.config)
        at_once = found.settings.at_once or compose.at_once(self.config.hydra.launcher)
        search = study.Search(found.settings, found.space, self.folder, self.launch, at_once, prunes=found.prunes)
        try:
            search.run()
        except RecipeError as error:
            raise ConfigCompositionException(str(error)) from None  # which Hydra shows as its words alone

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        """Those that compose; of the others the ledger says why not."""
        refused = {number: reason for number, job in enumerate(jobs, first) if (reason := self._refusal(job))}
        if not refused:
            self.launcher.launch(jobs, initial_job_idx=first)
            return
        from optpipe.sweep import Ledger

        for number, job in enumerate(jobs, first):
            if number in refused:
                Ledger(self.folder).refuse(number, job, refused[number])
            else:
                self.launcher.launch([job], initial_job_idx=number)

    def _refusal(self, job: Sequence[str]) -> str:
        try:
            self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

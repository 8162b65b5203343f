"""hydra/launcher=parallel: Hydra's joblib launcher, which goes on where the process of a job was killed.

joblib gives up all jobs with the first process that dies, for want of memory most likely, and ends those beside it; the
ledger knows which they were. They begin again one after the other, where there is more memory, and who is at fault is
seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from optpipe.sweep import ENDED, Ledger, State, is_gone

ENDING_SECONDS = 10.0


class Parallel(Launcher):  # type: ignore[misc]
    """Runs the jobs of an optpipe sweep side by side on this machine, and again those whose process died.

    settings: those of joblib.Parallel.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.given = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        self.ledger = Ledger(Path(str(config.hydra.sweep.dir)))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        jobs, begun = dict(enumerate(job_overrides, initial_job_idx)), time.time()
        found: dict[int, JobReturn] = {}
        rest = [list(jobs)]
        while rest:
            together = rest.pop(0)
            try:
                returned = self._launched([jobs[number] for number in together], together[0])
                found.update(zip(together, returned, strict=True))
                continue
            except TerminatedWorkerError:
                lost = self._lost()
                if not lost:
                    raise
            for number in lost:
                self.ledger.died(number, "its process or one beside it was killed; it goes on alone", again=True)
            for number in lost:
                try:
                    self._launched([jobs[number]], number)
                except TerminatedWorkerError:
                    self._lost()
                    self.ledger.died(number, "its process was killed twice, beside others and alone")
            over = {job.number for job in self.ledger.jobs() if job.state in ENDED and job.started >= begun}
            rest = _consecutive([number for number in jobs if number not in over | found.keys()])
        return [found.get(number, JobReturn(status=JobStatus.COMPLETED)) for number in jobs]

    def _launched(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

        launcher = JoblibLauncher(**self.settings)
        launcher.setup(**self.given)
        found: Sequence[JobReturn] = launcher.launch(job_overrides, first)
        return found

    def _lost(self) -> list[int]:
        """The jobs that ran, once their processes have ended."""
        until = time.monotonic() + ENDING_SECONDS
        while any(job.state is State.running for job in self.ledger.jobs()) and time.monotonic() < until:
            time.sleep(0.1)
        waiting = [job for job in self.ledger.jobs() if job.state is State.waiting]
        return [job.number for job in waiting if job.pid and is_gone(job)]


def _consecutive(numbers: Sequence[int]) -> list[list[int]]:
    """`numbers`, which rise, in parts without a gap: joblib's launcher counts its jobs."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return parts

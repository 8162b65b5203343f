"""The job that Hydra runs in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from optpipe import machine


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

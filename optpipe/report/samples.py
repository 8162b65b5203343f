"""Every call's time, as a run's folder keeps it beside report.json."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from optpipe.report.schema import Latency

Floats = NDArray[np.float64]


def arrays(path: Path) -> Mapping[str, NDArray[np.generic]]:
    """The arrays of an .npz file; none where there is no such file or it is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, BadZipFile, EOFError, zlib.error):
        return {}


def calls(folder: Path, latency: Latency) -> dict[str, Floats]:
    """Milliseconds of every call by contender (subject, eager, exported, …), taken in the same rounds."""
    if not latency.samples:
        return {}
    found = arrays(folder / latency.samples)
    return {
        name: np.asarray(found[name], float) for name in found if not name.endswith("_replica") and found[name].size
    }


def replica_logs(folder: Path, latency: Latency) -> dict[str, Floats]:
    """By contender, the logarithm of the median time of every replica, a fresh process: the independent units."""
    found = arrays(folder / latency.samples) if latency.samples else {}
    logs = {}
    for name, times in calls(folder, latency).items():
        replica = found.get(f"{name}_replica")
        if replica is not None and len(replica) == len(times):
            medians = [float(np.median(times[replica == number])) for number in np.unique(replica)]
            logs[name] = np.log(np.asarray(medians))
    return logs

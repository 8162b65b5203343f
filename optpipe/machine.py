"""This machine: what it is, and who may use it while something is being timed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from optpipe.progress import say

# The vector extensions that decide how fast integer and half precision arithmetic is, as Linux names them.
INSTRUCTION_SETS = (
    "sse4_2", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni_int8", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
CGROUP = Path("/sys/fs/cgroup")


@cache
def cpu() -> tuple[str, frozenset[str]]:
    """The processor's name and those of INSTRUCTION_SETS that it has."""
    if platform.system() == "Darwin":
        brand = _output("sysctl", "-n", "machdep.cpu.brand_string")
        found = {"asimd", "asimddp"} if platform.machine() == "arm64" else set()
        return brand or platform.processor(), frozenset(found)
    name, flags = platform.processor() or platform.machine(), ""
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = value
                break
    return name, frozenset(flags.split()) & frozenset(INSTRUCTION_SETS)


_sharing = 1  # jobs of a sweep that run at once on this machine
_given: int | None = None  # cores that a launcher gave this job of a sweep


def share_cores(jobs: int, given: int | None = None) -> None:
    """From now on this process takes its share of the cores, as one of `jobs`, and no more than it was given."""
    global _sharing, _given
    _sharing, _given = max(1, jobs), given


def usable_cores() -> int:
    """Cores that this process may keep busy: its share of `bound_cores`, at least one."""
    share = bound_cores() // _sharing
    return max(1, min(share, _given or share))


def bound_cores() -> int:
    """Cores that this process is bound to, or the whole ones of its container's quota.

    The kernel stops threads beyond the quota for most of every tenth of a second: a part of a core is none.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return bound if quota is None else max(1, min(bound, int(quota)))


def cpu_quota(root: Path = CGROUP) -> float | None:
    """Cores that the container may use on average (cgroup version 2 or 1); None without a limit."""
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(limit) / float(period) if float(limit) > 0 else None
    except (OSError, ValueError):  # there is no such file, or it says "max"
        return None


def _output(*command: str) -> str:
    """What `command` prints, or an empty string where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def device_problems(device: str) -> list[str]:
    """Why nothing can be run on `target.device` here; torch is imported only to look for a GPU."""
    if device == "cpu":
        return []
    if not re.fullmatch(r"cuda(:\d+)?", device):
        return [f"target.device is '{device}'; it must be cpu, cuda or cuda:<number>"]
    import torch

    if not torch.cuda.is_available():
        return [f"target.device is '{device}', but torch finds no GPU here; run on a machine that has one, or on cpu"]
    if (number := int(device.partition(":")[2] or 0)) >= torch.cuda.device_count():
        return [
            f"target.device is '{device}', but there are {torch.cuda.device_count()} GPUs here; {number} is too many"
        ]
    return []


def user_cache() -> Path:
    """The user's own cache folder for optpipe, readable by nobody else."""
    from platformdirs import user_cache_dir

    folder = Path(user_cache_dir("optpipe"))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


class MachineLock:
    """One machine, one clock: any number of optpipe processes may work at once, or a single one may time something."""

    def __init__(self, path: Path) -> None:
        from filelock import ReadWriteLock

        self._lock = ReadWriteLock(path)
        self._working = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the machine, among others, for work (training, exporting) that would disturb a timing."""
        if self._working:
            yield
            return
        self._acquire(self._lock.acquire_read, "waiting for another optpipe process that is timing a model")
        self._working = True
        try:
            yield
        finally:
            self._working = False
            self._lock.release()

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Hold the machine alone. A hold for work is given up meanwhile and taken again afterwards."""
        worked, self._working = self._working, False
        if worked:
            self._lock.release()
        try:
            self._acquire(self._lock.acquire_write, "waiting for other optpipe processes to pause before timing")
            try:
                yield
            finally:
                self._lock.release()
        finally:
            if worked:
                self._lock.acquire_read()
            self._working = worked

    def _acquire(self, acquire: Callable[..., Any], message: str) -> None:
        from filelock import Timeout

        try:
            acquire(timeout=1)
        except Timeout:
            say(f"{message} …")
            acquire()


@cache
def machine_lock() -> MachineLock:
    """The lock that all optpipe processes of this user share on this machine; a home folder may be that of many."""
    return MachineLock(user_cache() / f"{_machine_id()}.lock.db")


def _machine_id() -> str:
    """What all containers on this machine have in common, where the system tells."""
    told = Path("/proc/sys/kernel/random/boot_id")
    return f"machine-{told.read_text()[:13]}" if told.exists() else f"machine-{platform.node()}"

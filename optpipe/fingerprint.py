"""The fingerprint of a measurement: everything about this machine that a figure depends on."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optpipe.machine import INSTRUCTION_SETS, bound_cores, cpu, cpu_quota

REPORTED_PACKAGES = (
    "optpipe", "torch", "torchao", "torch-pruning", "onnx", "onnxruntime", "onnxscript", "numpy", "lightning-fabric",
    "openvino", "executorch", "onnx-ir",
)  # fmt: skip
NEEDED = ("cpu", "isa", "cores")
COMPARED = ("governor", "cpu_quota")
COMPARED_PACKAGES = ("torch", "onnxruntime", "openvino", "numpy")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
BOOST = (Path("/sys/devices/system/cpu/cpufreq/boost"), Path("/sys/devices/system/cpu/intel_pstate/no_turbo"))
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))


def environment() -> dict[str, Any]:
    """What a figure of this machine depends on, for the report. What a machine does not tell is said in words."""
    name, isa = cpu()
    return {
        "cpu": name,
        "isa": [extension for extension in INSTRUCTION_SETS if extension in isa],
        "cores": bound_cores(),
        "cpu_quota": cpu_quota() or "none",
        "memory_bytes": _memory_bytes(),
        "governor": _read(GOVERNOR) or "not offered by this system",
        "turbo": _turbo(),
        "container": any(mark.exists() for mark in CONTAINER_MARKS),
        "virtual_machine": "hypervisor" in (_read(Path("/proc/cpuinfo")) or ""),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else "not offered by this system",
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "none",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "onnxruntime_build": _onnxruntime_build(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "git": _output("git", "rev-parse", "--short", "HEAD"),
    }


def machine() -> dict[str, Any]:
    """What figures of this machine depend on, and its load does not change: equal where they can be used again."""
    here = environment()
    names = (*NEEDED, *COMPARED, "turbo", "gpu", "onnxruntime_build")
    versions = {name: here["versions"][name] for name in ("python", *COMPARED_PACKAGES)}
    return {**{name: here[name] for name in names}, "versions": versions}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What makes latencies measured in environments `a` and `b` no comparison of two models, in words.

    What an older report does not tell is not held against it, as long as it names the processor.
    """
    versions_a, versions_b = a.get("versions", {}), b.get("versions", {})
    told = [key for key in COMPARED if key in a and key in b]
    pairs = [(key, a.get(key, "unknown"), b.get(key, "unknown")) for key in (*NEEDED, *told)]
    packages = [name for name in COMPARED_PACKAGES if name in versions_a and name in versions_b]
    pairs += [(name, versions_a[name], versions_b[name]) for name in packages]
    return [f"{key} {_spoken(before)} / {_spoken(after)}" for key, before, after in pairs if before != after]


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {package: _version(package) for package in REPORTED_PACKAGES}


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _spoken(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _turbo() -> bool | str:
    boost, no_turbo = (_read(path) for path in BOOST)
    if boost:
        return boost == "1"
    return no_turbo == "0" if no_turbo else "not offered by this system"


def _onnxruntime_build() -> str:
    """ONNX Runtime's build, without its git commit."""
    import onnxruntime

    return str(onnxruntime.get_build_info()).partition("build type")[2].strip(" =:") or "unknown"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _output(*command: str) -> str:
    """What `command` prints, or an empty string where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""

"""Energy of a call, from the machine's own counters: RAPL on Intel and AMD processors, as Linux's powercap shows it.

The counters are of whole processor packages: everything that runs meanwhile is in the figure, an upper bound on a
machine that does something else too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optpipe.report.schema import NotMeasured

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Domain:
    """One processor package's counter, in microjoules; it starts again at 0 beyond `range_uj`."""

    counter: Path
    range_uj: int

    def read(self) -> int:
        return int(self.counter.read_text())

    def between(self, before: int, after: int) -> int:
        """Microjoules from one reading to the next, if it went round at most once."""
        return after - before if after >= before else after - before + self.range_uj


def domains(root: Path = POWERCAP) -> list[Domain] | NotMeasured:
    """The packages' counters, or why there are none."""
    folders = sorted(folder for folder in root.glob("intel-rapl:*") if folder.name.count(":") == 1)
    if not folders:
        return NotMeasured(f"this machine offers no energy counter: {root} holds no intel-rapl domain")
    found = []
    for folder in folders:
        domain = Domain(folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
        try:
            domain.read()
        except OSError as error:
            return NotMeasured(f"the energy counter {domain.counter} cannot be read: {error.strerror}")
        found.append(domain)
    return found


def joules_per_call(calls: Callable[[], int], root: Path = POWERCAP) -> float | NotMeasured:
    """Joules of each of the calls that `calls` makes and counts, or why they cannot be known."""
    found = domains(root)
    if isinstance(found, NotMeasured):
        return found
    before = [domain.read() for domain in found]
    count = calls()
    used = sum(domain.between(start, domain.read()) for domain, start in zip(found, before, strict=True))
    return used / 1e6 / count

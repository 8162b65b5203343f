"""The most memory that this process has during a span of its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optpipe.measure.worker import peak_memory_bytes
from optpipe.report.schema import NotMeasured

FORGET = Path("/proc/self/clear_refs")  # writing 5 sets the kernel's record of the peak back to what is resident now
UNKNOWN = NotMeasured("this system keeps no peak of a span")


@dataclass
class Peak:
    """Resident bytes, known once the span has ended."""

    bytes: int | NotMeasured = UNKNOWN
    growth_bytes: int | NotMeasured = UNKNOWN  # beyond what was resident at its beginning


def resident_bytes() -> int | NotMeasured:
    """What is resident now; the peak that the kernel keeps begins anew."""
    try:
        FORGET.write_text("5")
    except OSError:  # no Linux, or a container that forbids it
        return UNKNOWN
    return peak_memory_bytes()


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The peak until the end of the block; processes that are started meanwhile are not counted.

    The kernel keeps it: nothing runs beside the work, and no allocation is too short to be seen. Spans do not nest.
    """
    peak, before = Peak(), resident_bytes()
    yield peak
    if not isinstance(before, NotMeasured):
        peak.bytes = peak_memory_bytes()
        peak.growth_bytes = peak.bytes - before

"""The most memory that this process has had during a span of its work."""

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
    """Resident bytes, once the span has ended."""

    bytes: int | NotMeasured = UNKNOWN


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The peak until the end of the block; processes that are started meanwhile are not counted.

    The kernel keeps it: nothing runs beside the work, and no allocation is too short to be seen. Spans do not nest.
    """
    peak = Peak()
    try:
        FORGET.write_text("5")
    except OSError:  # no Linux, or a container that forbids it
        yield peak
        return
    try:
        yield peak
    finally:
        peak.bytes = peak_memory_bytes()

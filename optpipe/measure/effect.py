"""How far apart two independent runs are: Welch's test and Cohen's d."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpipe.report.schema import Interval

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Welch:
    """mean(a) - mean(b), with the two-sided p of equal means and the difference in pooled standard deviations."""

    difference: float
    ci95: Interval
    p: float
    cohens_d: float


def welch(a: Floats, b: Floats) -> Welch:
    """Welch's t-test (Biometrika 34, 1947) of two 1-D arrays, and Cohen's d.

    Raises ValueError for fewer than two values in one of them, or two arrays without any spread.
    """
    from scipy.special import stdtr, stdtrit

    if min(len(a), len(b)) < 2:
        raise ValueError(f"Welch's test needs at least 2 values on each side; there are {len(a)} and {len(b)}")
    shares = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    error = math.sqrt(sum(shares))
    if error == 0:
        raise ValueError("neither sample has any spread, so a difference cannot be judged against it")
    freedom = error**4 / (shares[0] ** 2 / (len(a) - 1) + shares[1] ** 2 / (len(b) - 1))
    difference = float(np.mean(a) - np.mean(b))
    half = float(stdtrit(freedom, 0.975)) * error
    squares = np.var(a, ddof=1) * (len(a) - 1) + np.var(b, ddof=1) * (len(b) - 1)
    return Welch(
        difference=difference,
        ci95=(difference - half, difference + half),
        p=float(2 * stdtr(freedom, -abs(difference) / error)),
        cohens_d=difference / math.sqrt(squares / (len(a) + len(b) - 2)),
    )

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
    """Two independent samples compared.

    difference: mean(a) - mean(b).
    p: two-sided, of the hypothesis that the means are equal.
    cohens_d: the difference in pooled standard deviations.
    """

    difference: float
    ci95: Interval
    p: float
    cohens_d: float
    degrees_of_freedom: float


def welch(a: Floats, b: Floats) -> Welch:
    """Welch's t-test, which lets variances differ (Biometrika 34, 1947), of two 1-D arrays, and the effect's size.

    Raises ValueError for fewer than two values, a value that is not finite, or two arrays without any spread.
    """
    from scipy.stats import ttest_ind

    _check(a, b)
    result = ttest_ind(a, b, equal_var=False)
    low, high = result.confidence_interval(0.95)
    return Welch(
        difference=float(np.mean(a) - np.mean(b)),
        ci95=(float(low), float(high)),
        p=float(result.pvalue),
        cohens_d=cohens_d(a, b),
        degrees_of_freedom=float(result.df),
    )


def cohens_d(a: Floats, b: Floats) -> float:
    """(mean(a) - mean(b)) / pooled standard deviation (Cohen, "Statistical power analysis", 2nd edition, 1988, §2.5).

    By his reading 0.2 is small, 0.5 medium, 0.8 large. Raises ValueError as `welch` does.
    """
    _check(a, b)
    squares = np.var(a, ddof=1) * (len(a) - 1) + np.var(b, ddof=1) * (len(b) - 1)
    pooled = math.sqrt(squares / (len(a) + len(b) - 2))
    return float((np.mean(a) - np.mean(b)) / pooled)


def _check(a: Floats, b: Floats) -> None:
    for values in (a, b):
        if np.ndim(values) != 1 or len(values) < 2:
            raise ValueError(
                f"Welch's test needs two 1-D arrays of at least 2 values; one has shape {np.shape(values)}"
            )
        if not np.isfinite(values).all():
            raise ValueError("Welch's test needs finite values; one is NaN or infinite")
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        raise ValueError("neither sample has any spread, so a difference cannot be judged against it")

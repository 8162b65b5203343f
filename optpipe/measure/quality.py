"""Intervals of a quality and of its difference from the baseline's on the same samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Interval = tuple[float, float]
Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
BOOTSTRAP_SAMPLES = 2000


def interval(scores: Scores) -> Interval:
    """95 % interval of the mean of per-sample `scores`, shape (n,).

    Scores of 0 and 1: Wilson's score interval (1927). Others: percentile bootstrap.
    """
    if not _is_binary(scores):
        return _bootstrap(scores)
    n, p = len(scores), float(scores.mean())
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * float(np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)))
    return max(0.0, centre - half), min(1.0, centre + half)


def delta_interval(scores: Scores, baseline: Scores) -> Interval:
    """95 % interval of mean(scores) - mean(baseline), both per sample on the same samples, shape (n,).

    Scores of 0 and 1: Tango's score interval for paired proportions (Statistics in Medicine 17, 1998), which does not
    shrink to nothing where no sample flips. Others: paired percentile bootstrap.
    """
    if not (_is_binary(scores) and _is_binary(baseline)):
        return _bootstrap(scores - baseline)
    gained = int(((scores == 1) & (baseline == 0)).sum())
    lost = int(((scores == 0) & (baseline == 1)).sum())
    return tango_interval(gained, lost, len(scores))


def tango_interval(gained: int, lost: int, n: int) -> Interval:
    """95 % score interval of (gained - lost) / n, where of n pairs `gained` and `lost` are discordant."""
    from scipy.optimize import brentq

    estimate = (gained - lost) / n

    def statistic(delta: float) -> float:
        # maximum-likelihood estimate of the probability of `lost` under the constraint of this delta
        a = 2 * n
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (np.sqrt(b * b - 4 * a * c) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        return float((gained - lost - n * delta) / np.sqrt(variance)) if variance > 0 else 0.0

    edge = 1e-9
    low = brentq(lambda d: statistic(d) - Z95, -1 + edge, estimate - edge) if estimate > -1 + 2 * edge else -1.0
    high = brentq(lambda d: statistic(d) + Z95, estimate + edge, 1 - edge) if estimate < 1 - 2 * edge else 1.0
    return float(low), float(high)


def _is_binary(scores: Scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _bootstrap(values: Scores) -> Interval:
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

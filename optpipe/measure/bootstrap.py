"""Bootstrap intervals of a mean over samples, and of a metric over a whole split.

Bias-corrected and accelerated (Efron, JASA 82, 1987), with tails widened for few samples (the expanded percentile of
Hesterberg, The American Statistician 69, 2015: normal quantiles become √(n/(n-1)) times Student's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from optpipe.predictions import Indices, Scores
from optpipe.report.schema import Interval

RESAMPLES = 2000  # of a mean
WHOLE_RESAMPLES = 1000  # of a metric that must be computed anew on each
GROUP_RESAMPLES = 300  # of the same, for one of many groups
CHUNK = 4_000_000  # numbers drawn at once, which bounds the memory
TAILS = (0.025, 0.975)


def interval_of_mean(values: Scores) -> Interval:
    """95 % interval of the mean of `values`, shape (n,)."""
    low, high = quantiles_of_mean(values, TAILS)
    return low, high


def quantiles_of_mean(values: Scores, probabilities: Sequence[float]) -> list[float]:
    """What the true mean of `values` is below with each of the probabilities."""
    centred = values - values.mean()
    if np.ptp(values) == 0:
        return [float(values[0])] * len(probabilities)
    acceleration = float((centred**3).sum() / (6 * (centred**2).sum() ** 1.5))  # the jackknife's, of a mean
    return quantiles(_means(values), float(values.mean()), len(values), probabilities, acceleration)


def quantiles(
    drawn: Scores, estimate: float, n: int, probabilities: Sequence[float], acceleration: float = 0.0
) -> list[float]:
    """What the true value is below with each of the probabilities, from its resampled values and n samples."""
    from scipy.special import ndtr, ndtri, stdtrit

    below = ((drawn < estimate).sum() + (drawn == estimate).sum() / 2) / len(drawn)
    bias = ndtri(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    found = []
    for probability in probabilities:
        z = math.sqrt(n / (n - 1)) * stdtrit(n - 1, probability) + bias
        shrink = max(1 - acceleration * z, 1e-6)
        found.append(float(np.quantile(drawn, ndtr(bias + z / shrink))))
    return found


def _means(values: Scores) -> Scores:
    """Means of resampled `values`, always the same for the same values."""
    rng, n = np.random.default_rng(0), len(values)
    rows = max(1, min(RESAMPLES, CHUNK // n))
    parts = [
        values[rng.integers(n, size=(min(rows, RESAMPLES - done), n))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    means: Scores = np.concatenate(parts)
    return means


def draws(n: int, count: int) -> Iterator[Indices]:
    """`count` resamples of n samples: the same for every model, so that models are compared on the same samples."""
    rng = np.random.default_rng(0)
    return (rng.integers(n, size=n) for _ in range(count))

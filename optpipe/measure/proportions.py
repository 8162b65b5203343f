"""Shares of right answers: intervals that stay open where no sample differs, as a bootstrap's would not."""

from __future__ import annotations

import math

from optpipe.report.schema import Interval

EDGE = 1e-12


def quantile_of_normal(probability: float) -> float:
    """Standard normal quantile."""
    from scipy.special import ndtri

    return 0.0 if probability == 0.5 else float(ndtri(probability))


def wilson_interval(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of right / n (Wilson, JASA 22, 1927)."""
    z, p = quantile_of_normal((1 + confidence) / 2), right / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def tango_interval(gained: float, lost: float, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of (gained - lost) / n, where `gained` and `lost` of n pairs are discordant.

    Tango, Statistics in Medicine 17 (1998) 891–908.
    """
    tail = (1 + confidence) / 2
    return -tango_bound(lost, gained, n, tail), tango_bound(gained, lost, n, tail)


def tango_bound(gained: float, lost: float, n: int, confidence: float) -> float:
    """What the true difference is below with probability `confidence`, one-sided; 0.5 gives (gained - lost) / n."""
    from scipy.optimize import brentq

    estimate, z = (gained - lost) / n, quantile_of_normal(confidence)
    if z == 0:
        return estimate
    low, high = (estimate + EDGE, 1 - EDGE) if z > 0 else (-1 + EDGE, estimate - EDGE)
    if low >= high:  # every pair is discordant the same way
        return estimate
    return float(brentq(lambda delta: _statistic(gained, lost, n, delta) + z, low, high, xtol=1e-12))


def _statistic(gained: float, lost: float, n: int, delta: float) -> float:
    """Tango's score statistic of the hypothesis that the difference is `delta`; falls as delta rises."""
    a = 2 * n  # the likelihood's largest value under that hypothesis solves a·q² + b·q + c = 0
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * q + delta * (1 - delta))
    distance = gained - lost - n * delta
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(1e9, distance)


def mcnemar_p(gained: int, lost: int) -> float:
    """Exact two-sided p of the hypothesis that a flip is as likely one way as the other (McNemar, 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def smallest_provable_drop(n: int, confidence: float, binary: bool = True) -> float:
    """The smallest limit that n samples can ever show to hold at `confidence`: Tango's bound where no sample flips.

    binary: whether samples are right or wrong; the bound of another metric may come as close to 0 as the data let it.
    """
    if not binary or confidence <= 0.5:
        return 0.0
    z = quantile_of_normal(confidence)
    return z**2 / (n + z**2)


def samples_needed(limit: float, confidence: float) -> int:
    """How many samples can show that a drop stays within `limit` at `confidence`, at least, if none flips.

    Raises ValueError if no number can: a limit of 0 asks for certainty.
    """
    if confidence <= 0.5:
        return 1
    if limit <= 0:
        raise ValueError(f"no number of samples can show at confidence={confidence:g} that nothing is lost")
    n = max(1, math.ceil(quantile_of_normal(confidence) ** 2 * (1 - limit) / limit))
    return n if smallest_provable_drop(n, confidence) <= limit else n + 1

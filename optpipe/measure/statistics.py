"""Ratios of times with intervals that cover the difference between two processes.

Two processes with one model differ by up to a few per cent, and calls, blocks and rounds inside a process cannot show
it. So the unit of the statistics is the replica, a fresh process of every contender: one ratio per replica, and
Student's interval of their mean on the logarithmic scale (Kalibera & Jones, "Rigorous benchmarking in reasonable time",
2013, who let the highest level of repetition decide). A bootstrap over so few replicas is too narrow: 74 % coverage
with three, 88 % with five, in a simulation where this difference dominates.

Replicas are forks of one process and share what it decided, such as where its libraries lie. What that changes is known
from comparisons that were repeated with other such processes, and widens every interval: SHARED_SD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optpipe.report.schema import Interval, Verdict

Floats = NDArray[np.float64]
SHARED_SD = 0.003  # of the logarithm of a ratio, from one set of forks to the next; benchmarks/honesty.py prints it


@dataclass(frozen=True)
class Ratio:
    """Time of a reference divided by time of the subject: above 1, the subject is faster."""

    value: float
    ci95: Interval
    logs: tuple[float, ...] = ()  # natural logarithm of the ratio in every replica

    @classmethod
    def of(cls, reference: Floats, subject: Floats) -> Ratio:
        """From the median times of blocks, both of shape (replicas, rounds): paired within a round, then a replica."""
        logs = np.median(np.log(reference) - np.log(subject), axis=1)
        mean, half = float(logs.mean()), half_width(logs, 0.95)
        return cls(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)), tuple(map(float, logs)))

    @property
    def width(self) -> float:
        """Of the interval, as a share of the value."""
        return (self.ci95[1] - self.ci95[0]) / self.value

    @property
    def each(self) -> list[float]:
        """The ratio in every replica."""
        return [math.exp(log) for log in self.logs]

    def verdict(self, margin: float) -> Verdict:
        """`faster` or `slower` only where the whole interval lies beyond the margin of equivalence."""
        if self.ci95[0] > 1 + margin:
            return "faster"
        return "slower" if self.ci95[1] < 1 - margin else "same"


def half_width(values: Sequence[float] | Floats, confidence: float) -> float:
    """Half of Student's two-sided interval of the mean of `values`; infinite for fewer than two."""
    return one_sided(values, (1 + confidence) / 2)


def one_sided(values: Sequence[float] | Floats, confidence: float) -> float:
    """How far the one-sided bound lies from the mean of `values`, logarithms; infinite for fewer than two."""
    from scipy.special import ndtri, stdtrit

    count = len(values)
    if confidence == 0.5:
        return 0.0
    if count < 2:
        return math.inf
    seen = float(stdtrit(count - 1, confidence) * np.std(values, ddof=1) / math.sqrt(count))
    return math.hypot(seen, float(ndtri(confidence)) * SHARED_SD)


def drift(times: Floats) -> float:
    """Time of the last third of rounds / of the first, `times` of shape (replicas, rounds): 1 where it is settled.

    Of the replicas' drifts the one nearest to 1: a disturbance moves some of them, a model that changes moves all.
    """
    third = max(1, times.shape[1] // 3)
    drifts = np.median(times[:, -third:], axis=1) / np.median(times[:, :third], axis=1)
    return float(drifts[np.argmin(np.abs(np.log(drifts)))])

"""What is known of a quality, and of its difference from the baseline's on the same samples.

Where each sample is right or wrong (scores of 0 and 1): Wilson's interval, and Tango's for the difference. Other scores
per sample: bootstrap of the mean, of the paired differences. Metrics over a whole split: bootstrap over samples, each
resample judged anew for both models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from optpipe.measure import bootstrap
from optpipe.measure.bootstrap import TAILS, WHOLE_RESAMPLES
from optpipe.measure.proportions import tango_bound, wilson_interval
from optpipe.predictions import Predictions, Scores
from optpipe.report.schema import Interval


class Undefined(ValueError):
    """There is no interval: the metric is undefined on most resamples."""


def interval(scores: Scores, fraction: bool = True) -> Interval:
    """95 % interval of the mean of per-sample `scores`, shape (n,); fraction: whether they are shares of 1."""
    if fraction and is_binary(scores):
        return wilson_interval(int(scores.sum()), len(scores))
    return bootstrap.interval_of_mean(scores)


def delta_interval(scores: Scores, baseline: Scores, fraction: bool = True) -> Interval:
    """95 % interval of mean(scores) - mean(baseline), both per sample on the same samples, shape (n,)."""
    low, high = _quantiles_of_scores(scores, baseline, fraction, TAILS)
    return low, high


def value_interval(predictions: Predictions, resamples: int = WHOLE_RESAMPLES) -> Interval:
    """95 % interval of the quality. Raises Undefined."""
    if predictions.scores is not None:
        return interval(predictions.scores, predictions.metric.unit == "fraction")
    drawn = resampled(predictions, resamples)
    low, high = interval_of_drawn(drawn, predictions.value, predictions.n)
    return low, high


def difference_quantiles(
    predictions: Predictions, baseline: Predictions, probabilities: Sequence[float], resamples: int = WHOLE_RESAMPLES
) -> list[float]:
    """What the true (quality - baseline's) is below with each of the probabilities. Raises Undefined."""
    if predictions.scores is not None and baseline.scores is not None:
        fraction = predictions.metric.unit == "fraction"
        return _quantiles_of_scores(predictions.scores, baseline.scores, fraction, probabilities)
    drawn = resampled(predictions, resamples) - resampled(baseline, resamples)
    estimate = predictions.value - baseline.value
    return bootstrap.quantiles(defined(drawn), estimate, predictions.n, probabilities)


def difference_interval(predictions: Predictions, baseline: Predictions, resamples: int = WHOLE_RESAMPLES) -> Interval:
    """95 % interval of the quality's difference from the baseline's. Raises Undefined."""
    low, high = difference_quantiles(predictions, baseline, TAILS, resamples)
    return low, high


def interval_of_drawn(drawn: Scores, estimate: float, n: int) -> Interval:
    """95 % interval from resampled values. Raises Undefined."""
    low, high = bootstrap.quantiles(defined(drawn), estimate, n, TAILS)
    return low, high


def defined(drawn: Scores) -> Scores:
    """Those resampled values where the metric is defined. Raises Undefined where most are not."""
    kept: Scores = drawn[np.isfinite(drawn)]
    if 2 * len(kept) < len(drawn):
        raise Undefined(f"the metric is defined on only {len(kept)} of {len(drawn)} resamples of these samples")
    return kept


@lru_cache(maxsize=8)
def resampled(predictions: Predictions, count: int) -> Scores:
    """The quality on `count` resamples of the split, NaN where it is undefined; the baseline's serve every step."""
    return predictions.resampled(bootstrap.draws(predictions.n, count))


@lru_cache(maxsize=4)
def resampled_classes(predictions: Predictions, count: int) -> Scores:
    """The same for every class, shape (count, classes)."""
    drawn = bootstrap.draws(predictions.n, count)
    values: Scores = np.stack([predictions.at(indices).of_classes() for indices in drawn])
    return values


def is_binary(scores: Scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def flips(predictions: Predictions, baseline: Predictions) -> tuple[int, int] | None:
    """How many samples are right only now, and only in the baseline; None where they are not right or wrong."""
    scores, before = predictions.scores, baseline.scores
    if scores is None or before is None or predictions.metric.unit != "fraction":
        return None
    if not (is_binary(scores) and is_binary(before)):
        return None
    risen, fallen = _discordant(scores, before)
    return (risen, fallen) if predictions.metric.higher_is_better else (fallen, risen)


def _discordant(scores: Scores, baseline: Scores) -> tuple[int, int]:
    return int((scores > baseline).sum()), int((scores < baseline).sum())


def _quantiles_of_scores(
    scores: Scores, baseline: Scores, fraction: bool, probabilities: Sequence[float]
) -> list[float]:
    binary = is_binary(scores) and is_binary(baseline)
    # shares that all stayed the same: at most as uncertain as right and wrong, and not certain as a bootstrap would say
    if fraction and (binary or np.array_equal(scores, baseline)):
        risen, fallen = _discordant(scores, baseline)
        return [tango_bound(risen, fallen, len(scores), probability) for probability in probabilities]
    return bootstrap.quantiles_of_mean(scores - baseline, probabilities)

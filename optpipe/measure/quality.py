"""How good a model is and how much it lost against the baseline, judged on the same samples."""

from __future__ import annotations

import numpy as np

from optpipe.errors import StageError
from optpipe.measure.bootstrap import WHOLE_RESAMPLES
from optpipe.measure.groups import groups, name_of
from optpipe.measure.intervals import (
    Undefined,
    difference_interval,
    difference_quantiles,
    flips,
    resampled,
    value_interval,
)
from optpipe.measure.intervals import delta_interval as delta_interval
from optpipe.measure.intervals import interval as interval
from optpipe.measure.proportions import mcnemar_p
from optpipe.measure.proportions import samples_needed as samples_needed
from optpipe.measure.proportions import smallest_provable_drop as smallest_provable_drop
from optpipe.measure.proportions import tango_interval as tango_interval
from optpipe.predictions import Predictions
from optpipe.report.schema import Interval, NotMeasured, Quality

FEW_SAMPLES = 30


def summary(predictions: Predictions, baseline: Predictions, class_names: list[str] | None = None) -> Quality:
    """The quality of a model on the test split, its distance from the baseline's, and both for every group.

    Raises StageError if the two were not judged on the same samples, or those are too few for an interval.
    """
    _same_samples(predictions, baseline)
    try:
        ci95, delta_ci95 = value_interval(predictions), difference_interval(predictions, baseline)
    except Undefined as error:
        raise StageError(f"metric '{predictions.metric.name}' cannot be given an interval: {error}") from error
    found, left_out = groups(predictions, baseline, class_names)
    metric, flipped = predictions.metric, flips(predictions, baseline)
    unknown = NotMeasured("the metric is not right or wrong per sample")
    return Quality(
        metric=metric.name,
        value=predictions.value,
        ci95=ci95,
        n=predictions.n,
        delta=predictions.value - baseline.value,
        delta_ci95=delta_ci95,
        higher_is_better=metric.higher_is_better,
        unit=metric.unit,
        gained=flipped[0] if flipped else unknown,
        lost=flipped[1] if flipped else unknown,
        mcnemar_p=mcnemar_p(*flipped) if flipped else unknown,
        groups=found,
        notes=[*_notes(predictions, baseline, delta_ci95, class_names), *left_out],
    )


def drop_bound(predictions: Predictions, baseline: Predictions, confidence: float) -> float:
    """What the true drop is below with probability `confidence`, one-sided; 0.5 gives the estimate.

    Raises ValueError if `confidence` is not between 0 and 1, StageError as `summary` does.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be above 0 and below 1")
    estimate = predictions.drop_from(baseline)
    if confidence == 0.5:
        return estimate
    bound = _drop_quantiles(predictions, baseline, (confidence,))[0]
    # a bootstrap's median may lie beside the estimate; a bound may not cross it
    return max(bound, estimate) if confidence > 0.5 else min(bound, estimate)


def drop_interval(predictions: Predictions, baseline: Predictions) -> Interval:
    """95 % interval of the drop. Raises StageError as `summary` does."""
    low, high = _drop_quantiles(predictions, baseline, (0.025, 0.975))
    return low, high


def _drop_quantiles(predictions: Predictions, baseline: Predictions, probabilities: tuple[float, ...]) -> list[float]:
    _same_samples(predictions, baseline)
    higher = predictions.metric.higher_is_better
    wanted = [1 - probability if higher else probability for probability in probabilities]
    try:
        found = difference_quantiles(predictions, baseline, wanted)
    except Undefined as error:
        raise StageError(f"metric '{predictions.metric.name}' cannot be given an interval: {error}") from error
    return [-quantile if higher else quantile for quantile in found]


def _same_samples(predictions: Predictions, baseline: Predictions) -> None:
    if predictions.n != baseline.n:
        raise StageError(
            f"the model was judged on {predictions.n} samples and the baseline on {baseline.n}; a split must hold the "
            "same samples, in the same order, each time that it is read"
        )
    if predictions.n < 2:
        raise StageError("the split holds 1 sample; an interval needs at least 2")


def _notes(
    predictions: Predictions, baseline: Predictions, delta_ci95: Interval, class_names: list[str] | None
) -> list[str]:
    notes, n, metric = [], predictions.n, predictions.metric
    classes = predictions.classes
    if classes is not None and len(np.unique(classes)) == 1:
        only = name_of(int(classes[0]), class_names)
        notes.append(f"only class {only} occurs in the test split: {metric.name} says nothing about the others")
    if flips(predictions, baseline) is not None:
        unseen = smallest_provable_drop(n, 0.975) * 100
        notes.append(f"with {n} samples, differences below ±{unseen:.2g} points cannot be told apart")
    elif n < FEW_SAMPLES:
        notes.append(f"with {n} samples the intervals are rough")
    if delta_ci95[0] == delta_ci95[1]:
        notes.append("no resample shows another difference: its interval has no width, which is not certainty")
    if predictions.scores is None:
        undefined = int(np.isnan(resampled(predictions, WHOLE_RESAMPLES)).sum())
        if undefined:
            notes.append(
                f"{metric.name} is undefined on {undefined} of {WHOLE_RESAMPLES} resamples, which are left out"
            )
    return notes

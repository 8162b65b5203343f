"""Quality per class, per label of a multi-label task, and per slice that the user names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optpipe.measure.bootstrap import GROUP_RESAMPLES
from optpipe.measure.intervals import (
    Undefined,
    difference_interval,
    interval_of_drawn,
    resampled_classes,
    value_interval,
)
from optpipe.predictions import Predictions
from optpipe.report.schema import Group, NotMeasured

MOST_GROUPS = 200  # of one kind that a report holds
FEWEST_SAMPLES = 2


def groups(
    predictions: Predictions, baseline: Predictions, class_names: list[str] | None
) -> tuple[list[Group], list[str]]:
    """Every group, and notes on what is left out."""
    by_class, notes = _classes(predictions, baseline, class_names)
    found = [*by_class, *_labels(predictions, baseline, class_names)]
    kept, more = _worst(found, predictions.metric.higher_is_better)
    return [*kept, *_slices(predictions, baseline)], notes + more


def name_of(number: int, class_names: list[str] | None) -> str:
    """A class or label by its name, or by its number where it has none."""
    return class_names[number] if class_names and number < len(class_names) else str(number)


def _classes(
    predictions: Predictions, baseline: Predictions, class_names: list[str] | None
) -> tuple[list[Group], list[str]]:
    classes, metric = predictions.classes, predictions.metric
    if classes is None:
        return [], []
    numbers = sorted({*map(int, np.unique(classes)), *range(len(class_names or ()))})
    names = [name_of(number, class_names) for number in numbers]
    if metric.compute is None:
        where = [np.flatnonzero(classes == number) for number in numbers]
        pairs = zip(names, where, strict=True)
        return [_group("class", name, predictions.at(index), baseline.at(index)) for name, index in pairs], []
    if metric.each_class is None:
        return [], [f"{metric.name} judges all classes together, so there is no figure per class"]
    sizes = [int((classes == number).sum()) for number in numbers]
    return list(_of_classes(predictions, baseline, numbers, names, sizes)), []


def _of_classes(
    predictions: Predictions, baseline: Predictions, numbers: list[int], names: list[str], sizes: list[int]
) -> Iterator[Group]:
    """Groups of a metric over the whole split that says something of each class."""
    value, before = predictions.of_classes(), baseline.of_classes()
    drawn = resampled_classes(predictions, GROUP_RESAMPLES)
    shift = drawn - resampled_classes(baseline, GROUP_RESAMPLES)
    for number, name, size in zip(numbers, names, sizes, strict=True):
        if size < FEWEST_SAMPLES or number >= len(value) or not np.isfinite([value[number], before[number]]).all():
            yield _unmeasured("class", name, size, _too_few(size) or _undefined(predictions))
            continue
        try:
            yield Group(
                by="class",
                label=name,
                n=size,
                value=float(value[number]),
                ci95=interval_of_drawn(drawn[:, number], float(value[number]), predictions.n),
                delta=float(value[number] - before[number]),
                delta_ci95=interval_of_drawn(shift[:, number], float(value[number] - before[number]), predictions.n),
            )
        except Undefined as error:
            yield _unmeasured("class", name, size, str(error))


def _labels(predictions: Predictions, baseline: Predictions, class_names: list[str] | None) -> Iterator[Group]:
    for number in range(min(predictions.num_labels, baseline.num_labels)):
        name = name_of(number, class_names)
        try:
            pair = predictions.of_label(number), baseline.of_label(number)
        except Exception as error:  # the user's own metric, made for all labels at once
            reason = f"metric '{predictions.metric.name}' cannot judge one label ({type(error).__name__}: {error})"
            yield _unmeasured("label", name, predictions.n, reason)
            continue
        yield _group("label", name, *pair)


def _slices(predictions: Predictions, baseline: Predictions) -> Iterator[Group]:
    for by, labels in predictions.slices.items():
        of_sample = np.array(labels)
        for label in sorted(set(labels)):
            index = np.flatnonzero(of_sample == label)
            yield _group(by, label, predictions.at(index), baseline.at(index))


def _group(by: str, label: str, predictions: Predictions, baseline: Predictions) -> Group:
    n = predictions.n
    if n < FEWEST_SAMPLES:
        return _unmeasured(by, label, n, _too_few(n))
    try:
        value, before = predictions.value, baseline.value
        if not np.isfinite([value, before]).all():
            return _unmeasured(by, label, n, _undefined(predictions))
        return Group(
            by=by,
            label=label,
            n=n,
            value=value,
            ci95=value_interval(predictions, GROUP_RESAMPLES),
            delta=value - before,
            delta_ci95=difference_interval(predictions, baseline, GROUP_RESAMPLES),
        )
    except Undefined as error:
        return _unmeasured(by, label, n, str(error))
    except Exception as error:  # the user's own metric, on samples of one kind
        return _unmeasured(by, label, n, f"{_undefined(predictions)} ({type(error).__name__}: {error})")


def _unmeasured(by: str, label: str, n: int, reason: str) -> Group:
    why = NotMeasured(reason)
    return Group(by=by, label=label, n=n, value=why, ci95=why, delta=why, delta_ci95=why)


def _too_few(n: int) -> str:
    if n >= FEWEST_SAMPLES:
        return ""
    return (
        "no sample of the test split is of this kind" if n == 0 else "only 1 sample of the test split is of this kind"
    )


def _undefined(predictions: Predictions) -> str:
    return f"metric '{predictions.metric.name}' is undefined on these samples"


def _worst(found: list[Group], higher_is_better: bool) -> tuple[list[Group], list[str]]:
    """Not more than a report can show: those that lost most, in their order."""
    if len(found) <= MOST_GROUPS:
        return found, []
    sign = 1 if higher_is_better else -1
    measured = [group for group in found if not isinstance(group.delta, NotMeasured)]
    lost = sorted(measured, key=lambda group: sign * float(group.delta))[:MOST_GROUPS]  # type: ignore[arg-type]
    kept = {id(group) for group in lost}
    kind = "classes" if found[0].by == "class" else "labels"
    note = f"of {len(found)} {kind}, the {len(lost)} that lost most are listed"
    return [group for group in found if id(group) in kept], [note]

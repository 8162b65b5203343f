"""Quality: what is said of a model, of its distance from the baseline, and of what its samples cannot tell."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import my_network
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import optpipe
from optpipe import Metric, Task, metrics, preflight
from optpipe.budget import Budget
from optpipe.measure.effect import cohens_d, welch
from optpipe.measure.intervals import delta_interval, interval
from optpipe.measure.proportions import (
    mcnemar_p,
    samples_needed,
    smallest_provable_drop,
    tango_interval,
    wilson_interval,
)
from optpipe.measure.quality import drop_bound, drop_interval, summary
from optpipe.predictions import Predictions
from optpipe.report import NotMeasured, Report
from optpipe.report.console import table
from optpipe.training import Schedule, fit
from optpipe.zoo import digits

CONFIDENCES = (0.05, 0.3, 0.5, 0.51, 0.7, 0.9, 0.95, 0.99, 0.999)


def task(inputs: Tensor, target: Tensor, metric: Metric, **more) -> Task:
    batches = [(inputs[i : i + 64], target[i : i + 64]) for i in range(0, len(inputs), 64)]
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), batches)
    return Task(**splits, example_inputs=inputs[:2], metric=metric, **more)


def judged(outputs: Tensor, target: Tensor, metric: Metric, **more) -> Predictions:
    """Predictions of a model that returns what it is given."""
    return task(outputs, target, metric, **more).predict(nn.Identity(), "test")


def classes(n: int = 450, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are mostly right and their targets."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(5, (n,), generator=torch.Generator().manual_seed(0))
    return nn.functional.one_hot(target, 5) * 2.0 + noise * torch.randn(n, 5, generator=generator), target


def regression(n: int = 200, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    target = torch.randn(n, 1, generator=torch.Generator().manual_seed(0))
    return target + noise * torch.randn(n, 1, generator=torch.Generator().manual_seed(1)), target


def labels(n: int = 120, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    target = torch.randint(2, (n, 3), generator=torch.Generator().manual_seed(0))
    return target * 2.0 - 1 + noise * torch.randn(n, 3, generator=torch.Generator().manual_seed(1)), target


# Intervals of shares: published examples


def test_wilson_interval_of_a_published_example() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe, Statistics in Medicine 17 (1998) 857–872
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_tango_interval_and_mcnemar_of_published_examples() -> None:
    # airway reactivity of 21 children, 1 and 7 of them discordant: Fagerland, Lydersen & Laake, Statistics in Medicine
    # 33 (2014) 2850–2875
    assert tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert mcnemar_p(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_p(0, 0) == 1.0


def test_tango_interval_lies_around_the_estimate_at_the_edges() -> None:
    assert tango_interval(10, 0, 10)[1] == 1.0
    low, high = tango_interval(0, 0, 450)
    assert low == pytest.approx(-high) and high == pytest.approx(1.96**2 / (450 + 1.96**2), rel=1e-3)
    for gained, lost, n in [(1, 0, 2), (0, 3, 1000), (200, 250, 450), (450, 0, 450)]:
        low, high = tango_interval(gained, lost, n)
        assert -1 <= low <= (gained - lost) / n <= high <= 1


@pytest.mark.parametrize("kind", ["right or wrong", "continuous", "skewed"])
def test_95_per_cent_of_the_intervals_of_a_difference_hold_the_truth(kind: str) -> None:
    rng = np.random.default_rng(3)
    held, tries, n = 0, 300, 60
    for _ in range(tries):
        if kind == "right or wrong":
            baseline = (rng.random(n) < 0.9).astype(float)
            scores = np.where(rng.random(n) < 0.1, 1 - baseline, baseline)
            truth = 0.1 * 0.1 - 0.9 * 0.1
        else:
            baseline = rng.normal(size=n)
            scores = baseline + (rng.normal(0.2, 1, n) if kind == "continuous" else rng.exponential(0.2, n))
            truth = 0.2
        low, high = delta_interval(scores, baseline, kind == "right or wrong")
        held += low <= truth <= high
    assert 0.91 < held / tries <= 0.985


# A model against its baseline


def test_a_summary_of_a_classifier() -> None:
    logits, target = classes()
    worse, _ = classes(noise=1.6)
    quality = summary(judged(worse, target, metrics.top1_accuracy()), judged(logits, target, metrics.top1_accuracy()))
    right, before = worse.argmax(1) == target, logits.argmax(1) == target
    assert (quality.gained, quality.lost) == (int((right & ~before).sum()), int((before & ~right).sum()))
    assert quality.delta == pytest.approx((quality.gained - quality.lost) / 450)
    assert quality.delta_ci95[0] < quality.delta < quality.delta_ci95[1] < 0 and quality.mcnemar_p < 0.01
    assert [group.label for group in quality.groups] == ["0", "1", "2", "3", "4"]
    assert sum(group.n for group in quality.groups) == 450
    assert sum(group.n * group.delta for group in quality.groups) / 450 == pytest.approx(quality.delta)
    assert "with 450 samples, differences below ±0.85 points cannot be told apart" in quality.notes


def test_the_same_model_twice_lost_nothing_and_is_not_certain_of_it() -> None:
    same = judged(*classes(), metrics.top1_accuracy())
    quality = summary(same, same)
    assert (quality.delta, quality.gained, quality.lost, quality.mcnemar_p) == (0, 0, 0, 1)
    assert quality.delta_ci95[0] < 0 < quality.delta_ci95[1]
    shares = judged(*labels(), metrics.multilabel_accuracy())
    assert summary(shares, shares).delta_ci95[1] > 0


@pytest.mark.parametrize("metric", [metrics.mean_absolute_error(), metrics.mean_squared_error(), metrics.r2()])
def test_regression_points_the_right_way(metric: Metric) -> None:
    outputs, target = regression()
    worse = outputs + torch.randn(200, 1, generator=torch.Generator().manual_seed(2))
    quality = summary(judged(worse, target, metric), baseline := judged(outputs, target, metric))
    lost = judged(worse, target, metric).drop_from(baseline)
    assert lost > 0 and quality.delta == pytest.approx(-lost if metric.higher_is_better else lost)
    assert quality.ci95[0] < quality.value < quality.ci95[1]
    assert quality.unit == "value" and not quality.groups and isinstance(quality.gained, NotMeasured)
    low, high = drop_interval(judged(worse, target, metric), baseline)
    assert 0 < low < lost < high


def test_an_error_rate_gains_where_it_falls() -> None:
    wrong = Metric(name="error", score=lambda o, t: (o.argmax(1) != t).float(), higher_is_better=False)
    logits, target = classes()
    worse, _ = classes(noise=2.0)
    errors = summary(judged(worse, target, wrong), judged(logits, target, wrong))
    accuracy = summary(*(judged(x, target, metrics.top1_accuracy()) for x in (worse, logits)))
    assert (errors.gained, errors.lost, errors.mcnemar_p) == (accuracy.gained, accuracy.lost, accuracy.mcnemar_p)
    assert errors.delta == pytest.approx(-accuracy.delta)
    assert errors.delta_ci95 == pytest.approx((-accuracy.delta_ci95[1], -accuracy.delta_ci95[0]))


def test_ready_made_metrics_agree_with_scikit_learn() -> None:
    from sklearn import metrics as reference

    logits, target = classes()
    assert judged(logits, target, metrics.f1()).value == pytest.approx(
        reference.f1_score(target, logits.argmax(1), average="macro")
    )
    outputs, wanted = labels()
    assert judged(outputs, wanted, metrics.f1()).value == pytest.approx(
        reference.f1_score(wanted, outputs > 0, average="macro")
    )
    exact = judged(outputs, wanted, metrics.multilabel_accuracy(exact=True))
    assert exact.value == pytest.approx(reference.accuracy_score(wanted, outputs > 0))
    assert judged(outputs, wanted, metrics.multilabel_accuracy()).value > exact.value
    outputs, wanted = regression()
    for metric, function in (
        (metrics.r2(), reference.r2_score),
        (metrics.mean_squared_error(), reference.mean_squared_error),
    ):
        assert judged(outputs, wanted, metric).value == pytest.approx(function(wanted, outputs))
    assert judged(outputs, wanted[:, 0], metrics.r2()).value == pytest.approx(reference.r2_score(wanted, outputs))


def test_shapes_that_would_broadcast_to_a_wrong_figure_are_refused() -> None:
    outputs, target = regression()
    with pytest.raises(optpipe.StageError, match=r"cannot judge the test split .* shapes must agree"):
        judged(outputs.expand(-1, 3), target, metrics.mean_absolute_error())


# Groups


def test_a_label_of_a_multi_label_task_is_judged_alone() -> None:
    outputs, target = labels()
    worse = outputs.clone()
    worse[:, 1] = -worse[:, 1]
    for metric in (metrics.multilabel_accuracy(), metrics.multilabel_accuracy(exact=True), metrics.f1()):
        quality = summary(*(judged(x, target, metric) for x in (worse, outputs)), ["cat", "dog", "eel"])
        assert [(group.by, group.label, group.n) for group in quality.groups] == [
            ("label", name, 120) for name in ("cat", "dog", "eel")
        ]
        assert quality.groups[0].delta == quality.groups[2].delta == 0
        assert quality.groups[1].delta_ci95[1] < 0


def test_f1_per_class_is_that_of_the_whole_split() -> None:
    from sklearn.metrics import f1_score

    logits, target = classes()
    quality = summary(judged(logits, target, metrics.f1()), judged(logits, target, metrics.f1()))
    assert [group.value for group in quality.groups] == pytest.approx(f1_score(target, logits.argmax(1), average=None))
    assert all(group.ci95[0] < group.value < group.ci95[1] for group in quality.groups)


def test_slices_that_the_user_names() -> None:
    logits, target = classes()
    slices = {
        "size": lambda logits, _: ["big" if row.max() > 2 else "small" for row in logits],
        "odd": lambda _, t: t % 2,
    }
    quality = summary(*[judged(logits, target, metrics.top1_accuracy(), slices=slices)] * 2)
    found = {(group.by, group.label): group.n for group in quality.groups if group.by != "class"}
    assert set(found) == {("size", "big"), ("size", "small"), ("odd", "0"), ("odd", "1")}
    assert found["odd", "1"] == int((target % 2).sum())


def test_a_group_that_is_too_small_or_undefined_says_so() -> None:
    logits, target = classes(40)
    target = torch.where(target == 4, 3, target)
    target[0] = 4
    names = ["a", "b", "c", "d", "e", "never"]
    one, none = summary(*[judged(logits, target, metrics.top1_accuracy())] * 2, names).groups[4:]
    assert "only 1 sample" in one.value.not_measured and one.n == 1
    assert "no sample of the test split" in none.delta_ci95.not_measured and none.label == "never"
    slices = {"class": lambda _, target: target}
    quality = summary(*[judged(logits[:, :1], (target > 1).long(), auc(), slices=slices)] * 2)
    assert all("metric 'auc' is undefined on these samples" in group.value.not_measured for group in quality.groups)
    assert "auc judges all classes together, so there is no figure per class" in quality.notes


def test_a_label_that_the_metric_cannot_judge_alone_says_so() -> None:
    weighted = Metric(name="w", score=lambda o, t: ((o > 0) == t.bool()).float() @ torch.tensor([0.5, 0.3, 0.2]))
    quality = summary(*[judged(*labels(), weighted)] * 2)
    assert "metric 'w' cannot judge one label" in quality.groups[0].value.not_measured


def test_of_very_many_classes_those_that_lost_most_are_listed() -> None:
    target = torch.arange(300).repeat(2)
    logits = nn.functional.one_hot(target, 300).float()
    worse = logits.clone()
    worse[target == 7] = 0.0
    quality = summary(*(judged(x, target, metrics.top1_accuracy()) for x in (worse, logits)))
    assert len(quality.groups) == 200 and "7" in {group.label for group in quality.groups}
    assert "of 300 classes, the 200 that lost most are listed" in quality.notes


# Bounds that a budget is judged by


@pytest.mark.parametrize("metric", [metrics.top1_accuracy(), metrics.f1()])
def test_the_bound_of_a_drop_rises_with_the_confidence_and_is_the_drop_at_a_half(metric: Metric) -> None:
    logits, target = classes(200)
    worse, _ = classes(200, noise=1.3)
    pair = judged(worse, target, metric), judged(logits, target, metric)
    bounds = [drop_bound(*pair, confidence) for confidence in CONFIDENCES]
    assert bounds == sorted(bounds) and bounds[CONFIDENCES.index(0.5)] == pair[0].drop_from(pair[1])
    low, high = drop_interval(*pair)
    assert low < bounds[CONFIDENCES.index(0.95)] < high
    with pytest.raises(ValueError, match="above 0 and below 1"):
        drop_bound(*pair, 1.0)


def test_what_a_number_of_samples_can_show() -> None:
    same = judged(*classes(180), metrics.top1_accuracy())
    assert drop_bound(same, same, 0.95) == pytest.approx(smallest_provable_drop(180, 0.95))
    assert 0.014 < smallest_provable_drop(180, 0.95) < 0.015
    assert smallest_provable_drop(180, 0.5) == 0 == smallest_provable_drop(180, 0.95, binary=False)
    for limit in (0.001, 0.005, 0.1):
        n = samples_needed(limit, 0.95)
        assert smallest_provable_drop(n, 0.95) <= limit < smallest_provable_drop(n - 1, 0.95)
    assert samples_needed(0.01, 0.5) == 1
    with pytest.raises(ValueError, match="no number of samples"):
        samples_needed(0, 0.95)


# What cannot be judged


def auc() -> Metric:
    from sklearn.metrics import roc_auc_score

    return Metric(name="auc", compute=lambda outputs, target: roc_auc_score(target, outputs))


def test_a_metric_over_the_whole_split_gives_its_interval_and_what_it_leaves_out() -> None:
    target = (torch.arange(12) > 9).long()
    outputs = torch.linspace(0, 1, 12).square()
    outputs[3] = 0.9
    quality = summary(*[judged(outputs, target, auc())] * 2)
    assert 0.9 < quality.value < 1 and quality.ci95[0] < quality.value
    assert any("auc is undefined on" in note and "left out" in note for note in quality.notes)
    assert any("with 12 samples the intervals are rough" in note for note in quality.notes)
    assert any("not certainty" in note for note in quality.notes)


@pytest.mark.filterwarnings("ignore:Only one class:sklearn.exceptions.UndefinedMetricWarning")
def test_one_class_only_makes_a_metric_undefined_or_a_note() -> None:
    logits, target = classes()
    ones = torch.ones_like(target)
    with pytest.raises(optpipe.StageError, match="metric 'auc' is nan on the test split, where only class 1 occurs"):
        judged(logits[:, 0], ones, auc())
    quality = summary(*[judged(logits, ones, metrics.top1_accuracy())] * 2, list("abcde"))
    assert "only class b occurs in the test split: accuracy says nothing about the others" in quality.notes


def test_too_few_samples_are_refused() -> None:
    one = judged(*regression(1), metrics.mean_absolute_error())
    with pytest.raises(optpipe.StageError, match="holds 1 sample; an interval needs at least 2"):
        summary(one, one)
    with pytest.raises(optpipe.StageError, match="on 2 samples and the baseline on 1; a split must hold the same"):
        drop_bound(judged(*regression(2), metrics.mean_absolute_error()), one, 0.9)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "neither score nor compute"),
        ({"score": len, "compute": len}, "score and compute; give exactly one"),
        ({"score": len, "unit": "percent"}, "must be 'fraction' or 'value'"),
        ({"score": len, "each_class": len}, "belongs to compute"),
    ],
)
def test_a_metric_judges_one_way(how: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Metric(name="mine", **how)


# Before a run


def refused(data: Task, model: nn.Module | None = None) -> str:
    with pytest.raises(optpipe.RecipeError) as error:
        preflight.check(model or nn.Identity(), data, Budget(), "this task")
    return str(error.value)


def test_a_task_that_its_metric_cannot_judge_is_refused() -> None:
    logits, target = classes()
    outputs, wanted = regression()
    text = refused(task(logits, nn.functional.one_hot(target, 5), metrics.top1_accuracy()))
    assert "metric 'accuracy' cannot judge outputs (64, 5) float32, targets (64, 5) int64" in text
    nan = Metric(name="mine", score=lambda o, t: o[:, 0] * float("nan"))
    assert "metric 'mine' gives NaN or infinity" in refused(task(logits, target, nan))
    mae = replace(metrics.mean_absolute_error(), unit="fraction")
    assert "no share between 0 and 1; make it with unit='value'" in refused(task(outputs * 9, wanted, mae))
    preflight.check(nn.Identity(), task(outputs, wanted, metrics.r2()), Budget(), "this task")


@pytest.mark.filterwarnings("ignore:Only one class:sklearn.exceptions.UndefinedMetricWarning")
def test_a_metric_is_more_than_its_name() -> None:
    outputs, target = classes(20)
    with pytest.raises(TypeError, match=r"metric is 'accuracy'; it must be an optpipe\.Metric"):
        task(outputs, target, "accuracy")


def test_a_metric_that_is_undefined_on_a_batch_is_judged_on_the_split() -> None:
    target = (torch.arange(200) > 150).long()
    preflight.check(nn.Identity(), task(torch.rand(200), target, auc()), Budget(), "this task")
    text = refused(task(torch.rand(200), torch.zeros(200, dtype=torch.long), auc()))
    assert "metric 'auc' is nan on the test split, where only class 0 occurs" in text and "validation" in text


def test_slices_and_names_that_do_not_fit_are_refused() -> None:
    logits, target = classes()
    slices = {"short": lambda inputs, _: ["a"], "broken": lambda inputs, _: inputs["image"]}
    assert "slice 'short' gave 1 labels for 64 samples" in refused(
        task(logits, target, metrics.top1_accuracy(), slices={"short": slices["short"]})
    )
    assert "slice 'broken' raised" in refused(
        task(logits, target, metrics.top1_accuracy(), slices={"broken": slices["broken"]})
    )
    assert "class_names holds 2 names, but class 4 occurs" in refused(
        task(logits, target, metrics.top1_accuracy(), class_names=["a", "b"])
    )
    assert "class_names holds 2 names for 3 labels" in refused(task(*labels(), metrics.f1(), class_names=["a", "b"]))


def test_a_test_split_that_is_shuffled_is_refused() -> None:
    logits, target = classes()
    data = task(logits, target, metrics.top1_accuracy())
    pairs = torch.utils.data.TensorDataset(logits, target)
    data.test = torch.utils.data.DataLoader(pairs, batch_size=64, shuffle=True)
    assert "the test split starts with other samples when it is read again" in refused(data)
    data.test = iter([(logits, target)])
    assert "can be read many times" in refused(data)


# Two runs


def test_welch_and_cohens_d() -> None:
    # the first example of https://en.wikipedia.org/wiki/Welch%27s_t-test: means 20.8 and 23.0, 25.0 degrees, p = 0.021
    a = np.array([27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4])
    b = np.array([27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4])
    result = welch(a, b)
    assert (result.p, result.degrees_of_freedom) == pytest.approx((0.021, 25.0), abs=5e-2)
    assert result.p == pytest.approx(0.021, abs=5e-4)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert result.ci95[0] < result.difference < result.ci95[1] < 0
    assert cohens_d(np.array([1.0, 2, 3]), np.array([3.0, 4, 5])) == -2
    assert cohens_d(a, b) == -cohens_d(b, a) == result.cohens_d
    with pytest.raises(ValueError, match="at least 2 values"):
        welch(a[:1], b)
    with pytest.raises(ValueError, match="neither sample has any spread"):
        welch(np.ones(4), np.ones(3))


def test_intervals_of_a_mean_are_wide_where_samples_are_few() -> None:
    values = np.random.default_rng(0).normal(size=400)
    few, many = interval(values[:5], False), interval(values, False)
    assert few[1] - few[0] > 4 * (many[1] - many[0])
    assert interval(np.full(5, 2.0), False) == (2.0, 2.0)


# In a run


def run(project: Path, model: nn.Module | None, data: Task, *overrides: str) -> Any:
    """Nothing is timed."""
    quick = ("target.instruction_set=neon", "tracking=none", "pipeline=[clip,trace]", *overrides)
    return optpipe.optimize(
        model, data, recipe="clip_int8", overrides=quick, config_dir="my_conf", output=project / "run"
    )


def test_the_digits_are_reported_by_class_and_by_ink(project: Path) -> None:
    torch.manual_seed(0)
    model, data = digits.DigitsNet(widths=(8, 8, 16)), digits.task()
    fit(
        model, data.train, lambda _, outputs, target: data.loss(outputs, target), Schedule(epochs=2, learning_rate=1e-2)
    )
    report = Report.read(run(project, model, data, "clip.limit=0.15").folder)
    quality = report.final.measurement.quality
    assert quality.delta < 0 and quality.lost > quality.gained and report.baseline.quality.groups
    by_class = [group for group in quality.groups if group.by == "class"]
    assert [group.label for group in by_class] == [str(digit) for digit in range(10)]
    assert sum(group.n for group in by_class) == 450
    assert {group.label for group in quality.groups if group.by == "ink"} == {"dark", "light"}
    saved = {name: np.load(project / "run" / "quality" / f"{name}.npz")["scores"] for name in ("baseline", "final")}
    assert saved["final"].mean() - saved["baseline"].mean() == pytest.approx(quality.delta)


def test_a_model_is_judged_once_for_each_content_and_split(project: Path) -> None:
    seen = []
    data = replace(my_network.pixels(), slices={"seen": lambda _, target: seen.append(1) or target})
    run(project, None, data, "clip.limit=1000")
    each = len(data.test) + len(data.validation)  # of the model that came in, and of the one that came out
    assert len(seen) == 1 + 2 * each  # with the first check; clip leaves the given model as it is


@pytest.mark.parametrize(
    ("metric", "shown"), [(metrics.f1(), "Δ points"), (metrics.mean_absolute_error(), "mae ↓"), (metrics.r2(), "Δ r2")]
)
def test_metrics_of_every_kind_travel_through_a_run(project: Path, metric: Metric, shown: str) -> None:
    torch.manual_seed(0)
    model, data = my_network.Perceptron().eval(), replace(my_network.pixels(), metric=metric)
    for split in ("train", "validation", "calibration", "test"):  # targets that this model predicts well
        logits = [(x, model(x).detach()) for x, _ in getattr(data, split)]
        values = [(x, y + 0.05 * torch.randn(y.shape)) for x, y in logits]
        setattr(data, split, values if metric.unit == "value" else [(x, y.argmax(1)) for x, y in values])
    result = run(project, model, data, "clip.limit=0.05", "budget.quality_drop=0.001")
    quality = result.report.final.measurement.quality
    assert (quality.delta < 0) == metric.higher_is_better and quality.metric == metric.name
    assert "quality_drop is" in result.report.budget.violations[0]
    saved = np.load(project / "run" / "quality" / "final.npz")
    assert set(saved) == ({"scores"} if metric.score else {"outputs", "targets"})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(result.report))
    assert shown in console.export_text()

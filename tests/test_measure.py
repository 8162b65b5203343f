"""Latency by real worker processes, and the intervals of a quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from optpipe.forms import form
from optpipe.measure.latency import Bench, Contender, MeasureError, Ratio
from optpipe.measure.quality import delta_interval, interval, tango_interval
from optpipe.measure.settings import Measure

QUICK = Measure(replicas=1, max_seconds=0.6, min_rounds=4, block_seconds=0.02)


def contender(folder: Path, model: nn.Module) -> Contender:
    folder.mkdir()
    form("torch").save(model, folder)
    return Contender(folder, "torch", threads=1)


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    np.savez(tmp_path / "batch.npz", **{"0": np.ones((8, 512), np.float32)})
    return tmp_path / "batch.npz"


def test_a_model_with_less_work_is_faster(tmp_path: Path, batch: Path) -> None:
    small = contender(tmp_path / "small", nn.Sequential(*(nn.Linear(512, 512) for _ in range(2))))
    large = contender(tmp_path / "large", nn.Sequential(*(nn.Linear(512, 512) for _ in range(20))))
    with Bench(QUICK, tmp_path / "logs") as bench:
        comparison = bench.compare(small, [large], batch)
    assert comparison.ratios[0].verdict(QUICK.margin) == "faster"
    assert comparison.ratios[0].value > 2
    assert comparison.peak_memory_bytes > 10**7
    assert np.median(comparison.milliseconds) < np.median(comparison.reference_milliseconds[0])


def test_a_verdict_needs_the_whole_interval_beyond_the_margin() -> None:
    assert Ratio(1.05, (1.03, 1.07)).verdict(0.02) == "faster"
    assert Ratio(1.05, (1.01, 1.09)).verdict(0.02) == "same"
    assert Ratio(0.95, (0.90, 1.00)).verdict(0.02) == "same"
    assert Ratio(0.90, (0.85, 0.95)).verdict(0.02) == "slower"


def test_a_worker_that_dies_leaves_its_last_words(tmp_path: Path, batch: Path) -> None:
    wrong = contender(tmp_path / "wrong", nn.Linear(3, 3))
    with Bench(QUICK, tmp_path / "logs") as bench, pytest.raises(MeasureError) as error:
        bench.compare(wrong, [], batch)
    assert "the process that timed the model in torch died" in str(error.value)
    assert "shapes cannot be multiplied" in str(error.value)


def test_a_worker_that_hangs_is_killed(tmp_path: Path, batch: Path) -> None:
    import time

    class Sleeps(nn.Module):
        def forward(self, x):
            time.sleep(60)
            return x

    asleep = contender(tmp_path / "asleep", Sleeps())
    settings = Measure(replicas=1, timeout_seconds=8)
    with (
        Bench(settings, tmp_path / "logs") as bench,
        pytest.raises(MeasureError, match="silent for 8 s and was killed"),
    ):
        bench.compare(asleep, [], batch)


def test_the_parent_sleeps_while_a_worker_measures(tmp_path: Path, batch: Path) -> None:
    import time

    model = contender(tmp_path / "model", nn.Linear(512, 512))
    with Bench(Measure(replicas=1, max_seconds=2, min_rounds=20), tmp_path / "logs") as bench:
        bench.compare(model, [], batch)
        wall, cpu = time.perf_counter(), time.process_time()
        bench.compare(model, [], batch)
        assert time.process_time() - cpu < 0.3 * (time.perf_counter() - wall)


def test_zero_flips_do_not_mean_zero_uncertainty() -> None:
    same = np.ones(450)
    low, high = delta_interval(same, same)
    assert low < 0 < high and high == pytest.approx(-low)
    assert high == pytest.approx(1.96**2 / (450 + 1.96**2), rel=1e-3)  # closed form of Tango's interval at zero flips


def test_the_interval_of_a_difference_lies_around_it_and_narrows_with_n() -> None:
    low, high = tango_interval(gained=2, lost=12, n=100)
    assert low < -0.10 < high < 0
    wider = tango_interval(gained=1, lost=6, n=50)
    assert wider[1] - wider[0] > high - low
    assert tango_interval(gained=12, lost=2, n=100) == pytest.approx((-high, -low), abs=1e-6)


def test_intervals_of_a_share_and_of_a_continuous_metric() -> None:
    low, high = interval(np.array([1.0] * 95 + [0.0] * 5))
    assert 0.88 < low < 0.95 < high < 0.98
    assert interval(np.ones(450))[0] < 1.0
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low < 0.3
    low, high = delta_interval(values - 0.5, values)
    assert low == pytest.approx(-0.5) and high == pytest.approx(-0.5)  # the same shift of every sample

"""Latency by real worker processes, and the intervals of a quality."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from optpipe.forms import form
from optpipe.measure.latency import Bench, Contender, lasting_change
from optpipe.measure.nursery import MeasureError
from optpipe.measure.quality import delta_interval, interval, tango_interval
from optpipe.measure.settings import Measure
from optpipe.measure.statistics import Ratio, drift

QUICK = Measure(replicas=3, rounds=3, max_seconds=0.6, noise_limit=2)


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
        (comparison,) = bench.compare([small, large], [batch])
    assert comparison.ratio(0, 1).verdict(QUICK.margin) == "faster"
    assert comparison.ratio(0, 1).value > 2
    assert comparison.ratio(1, 0).value == pytest.approx(1 / comparison.ratio(0, 1).value)
    assert all(peak > 10**7 for peak in comparison.peak_memory_bytes)
    assert np.median(comparison.milliseconds(0)) < np.median(comparison.milliseconds(1))
    assert len(comparison.blocks) == len(comparison.load_ms) >= QUICK.replicas


def test_every_call_is_kept_with_the_process_that_made_it(tmp_path: Path, batch: Path) -> None:
    model = contender(tmp_path / "model", nn.Linear(512, 512))
    with Bench(QUICK, tmp_path / "logs") as bench:
        (comparison,) = bench.compare([model, model], [batch])
    comparison.save(tmp_path / "samples" / "b1.npz", ["subject", "twin"])
    samples = np.load(tmp_path / "samples" / "b1.npz")
    assert set(samples) == {"subject", "subject_replica", "twin", "twin_replica"}
    assert len(samples["twin"]) == len(samples["twin_replica"]) == len(comparison.milliseconds(1))
    assert set(samples["subject_replica"]) == set(range(len(comparison.blocks)))


def test_a_verdict_needs_the_whole_interval_beyond_the_margin() -> None:
    assert Ratio(1.05, (1.03, 1.07)).verdict(0.02) == "faster"
    assert Ratio(1.05, (1.01, 1.09)).verdict(0.02) == "same"
    assert Ratio(0.95, (0.90, 1.00)).verdict(0.02) == "same"
    assert Ratio(0.90, (0.85, 0.95)).verdict(0.02) == "slower"


def test_a_worker_that_dies_leaves_its_last_words(tmp_path: Path, batch: Path) -> None:
    wrong = contender(tmp_path / "wrong", nn.Linear(3, 3))
    with Bench(QUICK, tmp_path / "logs") as bench, pytest.raises(MeasureError) as error:
        bench.compare([wrong], [batch])
    assert "the process that timed the model in torch died" in str(error.value)
    assert "shapes cannot be multiplied" in str(error.value)


def test_a_worker_that_hangs_is_killed(tmp_path: Path, batch: Path) -> None:
    import time

    class Sleeps(nn.Module):
        def forward(self, x):
            time.sleep(60)
            return x

    asleep = contender(tmp_path / "asleep", Sleeps())
    settings = Measure(replicas=2, timeout_seconds=3)
    with (
        Bench(settings, tmp_path / "logs") as bench,
        pytest.raises(MeasureError, match="silent for 3 s and was killed"),
    ):
        bench.compare([asleep], [batch])


def test_a_nursery_that_was_killed_is_one_comparison_lost(tmp_path: Path, batch: Path) -> None:
    model = contender(tmp_path / "model", nn.Linear(512, 512))
    with Bench(QUICK, tmp_path / "logs") as bench:
        bench.compare([model], [batch])
        killed = bench._nursery("torch")
        worker = killed.worker(10)
        os.kill(killed._process.pid, signal.SIGKILL)
        killed._process.wait()
        with pytest.raises(MeasureError, match="the process that times models in torch died"):
            worker.close()
        (comparison,) = bench.compare([model], [batch])
    assert len(comparison.blocks) >= QUICK.replicas


def test_the_parent_sleeps_while_a_worker_measures(tmp_path: Path, batch: Path) -> None:
    import time

    model = contender(tmp_path / "model", nn.Linear(512, 512))
    with Bench(Measure(replicas=5, rounds=20, max_seconds=0.1), tmp_path / "logs") as bench:
        bench.compare([model], [batch])
        wall, cpu = time.perf_counter(), time.process_time()
        bench.compare([model], [batch])
        assert time.process_time() - cpu < 0.3 * (time.perf_counter() - wall)


def test_a_model_that_slows_down_from_call_to_call_is_no_figure(tmp_path: Path, batch: Path) -> None:
    class Grows(nn.Module):
        """Each call does 3 % more than the one before."""

        work = 1.0

        def forward(self, x):
            self.work *= 1.03
            for _ in range(int(self.work)):
                x = x + 1
            return x

    grows = contender(tmp_path / "grows", Grows())
    steady = contender(tmp_path / "steady", nn.Linear(512, 512))
    with Bench(dataclasses.replace(QUICK, rounds=12, noise_limit=1e6), tmp_path / "logs") as bench:
        (comparison,) = bench.compare([grows, steady], [batch])
    assert "does not settle" in comparison.problem and "state that grows" in comparison.problem


def test_a_ratio_that_the_machine_is_too_noisy_for_is_no_figure(tmp_path: Path, batch: Path) -> None:
    class Moody(nn.Module):
        """As fast as chance has it, another chance in every process."""

        def forward(self, x):
            import os

            for _ in range(1 + 40 * (os.getpid() % 3)):
                x = x + 1
            return x

    moody = contender(tmp_path / "moody", Moody())
    with Bench(Measure(replicas=3, rounds=3, max_seconds=0.1), tmp_path / "logs") as bench:
        (comparison,) = bench.compare([moody, contender(tmp_path / "steady", nn.Linear(512, 512))], [batch])
    assert "the machine is too noisy" in comparison.problem and "noise_limit=0.4" in comparison.problem


def test_callers_at_once_and_a_sustained_load(tmp_path: Path, batch: Path) -> None:
    model = contender(tmp_path / "model", nn.Linear(512, 512))
    with Bench(QUICK, tmp_path / "logs") as bench:
        one, two = bench.callers(model, batch, 8, [1, 2])
        sustained = bench.sustained(model, batch, 0.6)
    assert (one.callers, two.callers) == (1, 2) and two.throughput > 0
    assert one.throughput > 0 and one.p50_ms <= one.p95_ms
    assert 0.6 <= sustained.seconds < 10 and len(sustained.p50_ms) == 6
    assert sustained.drift == pytest.approx(sustained.p50_ms[-1] / sustained.p50_ms[0])


def test_the_interval_of_a_ratio_is_of_processes_not_of_calls() -> None:
    reference = np.full((5, 40), 2.0)
    subject = np.repeat([[1.0], [1.1], [0.9], [1.05], [0.95]], 40, axis=1)  # every round of a process agrees
    few, many = Ratio.of(reference[:, :2], subject[:, :2]), Ratio.of(reference, subject)
    assert few.ci95 == pytest.approx(many.ci95)
    assert many.ci95[0] < many.value < many.ci95[1] and many.width > 0.1


def test_intervals_over_processes_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        logs = rng.normal(0.2, 0.03, (7, 1)) + rng.normal(0, 0.01, (7, 5))
        ratio = Ratio.of(np.exp(logs), np.ones((7, 5)))
        covered += ratio.ci95[0] <= np.exp(0.2) <= ratio.ci95[1]
    assert 0.92 <= covered / 400 <= 0.98


def test_drift_is_what_all_processes_share() -> None:
    settled = np.ones((3, 6))
    disturbed = settled.copy()
    disturbed[0, 4:] = 2
    growing = np.tile(np.linspace(1, 2, 6), (3, 1))
    assert drift(settled) == drift(disturbed) == 1
    assert drift(growing) > 1.5


def test_a_change_lasts_if_it_goes_on_when_looked_at_again() -> None:
    def blocks(*times: float) -> list:
        return [[[np.array([time]) for time in times], [np.ones(1) for _ in times]] for _ in range(3)]

    assert lasting_change(blocks(1, 1.2, 1.4), blocks(1.6, 1.8, 2)) == pytest.approx(2 / 1.6)
    assert lasting_change(blocks(1, 1, 1.4), blocks(1, 1, 1.4)) == 1  # a disturbance that came twice
    assert lasting_change(blocks(1.4, 1.2, 1), blocks(1, 1, 1)) == 1  # it was warming up


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

"""What is known of a machine: its fingerprint, its limits and its energy counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optpipe import lower
from optpipe.fingerprint import differences, environment
from optpipe.machine import cpu_quota, usable_cores
from optpipe.measure import energy
from optpipe.measure.inspect import inspect
from optpipe.measure.roofline import operations, peaks, roofline
from optpipe.report.schema import NotMeasured, Roofline
from optpipe.task import Task, top1_accuracy


def test_the_fingerprint_tells_what_figures_depend_on() -> None:
    here = environment()
    for key in ("cpu", "isa", "cores", "governor", "turbo", "container", "virtual_machine", "memory_bytes", "gpu"):
        assert here[key] is not None and here[key] != ""
    assert here["memory_bytes"] > 2**28 and here["load_average"] >= 0
    assert here["versions"]["onnxruntime"] != "not installed"


def test_what_makes_figures_no_comparison_is_said_and_the_rest_is_not() -> None:
    here = environment()
    assert differences(here, {**here, "load_average": 99.0, "git": "another"}) == []
    other = {**here, "cpu": "Another Processor", "cores": 64, "versions": {**here["versions"], "torch": "1.0"}}
    said = " ".join(differences(here, other))
    assert "Another Processor" in said and "cores" in said and "torch" in said
    older = {key: here[key] for key in ("cpu", "isa", "cores")}
    assert differences(here, older) == [] != differences(here, {})


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota
    assert usable_cores() >= 1


def powercap(root: Path, microjoules: int) -> Path:
    """A folder as Linux offers for two packages, the first with a part of its own."""
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (root / name).mkdir(exist_ok=True, parents=True)
        (root / name / "energy_uj").write_text(str(microjoules))
        (root / name / "max_energy_range_uj").write_text("1000000")
    return root


def test_energy_is_that_of_all_packages_and_survives_a_counter_that_starts_again(tmp_path: Path) -> None:
    def calls() -> int:
        powercap(tmp_path, 100_000)
        return 4

    powercap(tmp_path, 900_000)
    assert energy.joules_per_call(calls, tmp_path) == pytest.approx(2 * 0.2 / 4)


def test_without_a_counter_the_reason_is_given(tmp_path: Path) -> None:
    found = energy.joules_per_call(lambda: 1, tmp_path)
    assert isinstance(found, NotMeasured) and "holds no intel-rapl domain" in found.not_measured
    (powercap(tmp_path, 1) / "intel-rapl:0" / "energy_uj").unlink()
    found = energy.joules_per_call(lambda: 1, tmp_path)
    assert isinstance(found, NotMeasured) and "cannot be read: No such file" in found.not_measured


class Adds(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1.5


@pytest.mark.parametrize(
    ("model", "shape", "binds"),
    [
        (nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), (64, 1024), "compute"),
        (Adds(), (16, 2**20), "memory"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), (1, 4), "overhead"),
    ],
)
def test_what_binds_a_model(model: nn.Module, shape: tuple[int, ...], binds: str, tmp_path: Path) -> None:
    found = placed(model, shape, tmp_path)
    assert found.binds == binds
    assert 0.1 < found.share_of_limit < 1.5


def test_operations_are_counted_two_per_multiply_and_add(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(16 * 36, 10))
    seen = looked_into(model, (2, 8, 6, 6), tmp_path)
    counted = [operations(seen, node) for node in seen.nodes]
    assert 2 * (2 * 16 * 36) * (4 * 9) in counted
    assert 2 * (2 * 10) * (16 * 36) in counted


def placed(model: nn.Module, shape: tuple[int, ...], folder: Path) -> Roofline:
    return roofline(looked_into(model, shape, folder), peaks(threads=1))


def looked_into(model: nn.Module, shape: tuple[int, ...], folder: Path) -> Any:
    empty: list = []
    task = Task(
        train=empty, validation=empty, calibration=empty, test=empty,
        example_inputs=torch.zeros(2, *shape[1:]), metric=top1_accuracy(),
    )  # fmt: skip
    lower.to_onnx(lower.trace(model.eval(), task), folder / "model.onnx")
    np.savez(folder / "inputs.npz", **{"0": np.ones(shape, np.float32)})
    return inspect(folder / "model.onnx", folder / "inputs.npz", threads=1)

"""Networks of many kinds leave Python with equal outputs, or the line of their source says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import thirty
from thirty import NETWORKS, TRANSFORMERS, Carried, carry

QUICK = ("plain", "u-net", "dataclass", "optional given", "keywords", "reports", "stops early")


def judge(name: str, folder: Path) -> Carried:
    line = {**NETWORKS, **TRANSFORMERS}[name].line
    carried = carry(name, folder)
    if line:
        assert not carried.is_exported and f"{Path(thirty.__file__).name}:" in carried.reasons[0]
        assert line in carried.reasons[0]
    else:
        assert carried.is_exported, carried.reasons
    return carried


@pytest.mark.parametrize("name", QUICK)
def test_a_network_leaves_python_or_its_line_says_why_not(name: str, tmp_path: Path) -> None:
    judge(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in QUICK])
def test_every_network_leaves_python_or_its_line_says_why_not(name: str, tmp_path: Path) -> None:
    judge(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_networks_of_transformers_leave_python(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason='pip install "optpipe[lm]"')
    judge(name, tmp_path)


def test_there_are_thirty_and_nearly_all_are_expected_to_be_exported() -> None:
    assert len(NETWORKS) >= 30
    assert sum(not network.line for network in NETWORKS.values()) >= 27

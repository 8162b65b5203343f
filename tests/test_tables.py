"""Tables that stages leave in the report, and how the page shows them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports
from test_report import page

import optpipe
from optpipe.report import NotMeasured, Report, Table
from optpipe.report.figures import aligned
from optpipe.report.page import write_page
from optpipe.report.tables import View

LAYERS = [f"encoder.layers.{i}.attention.query" for i in range(40)]


def table(**changed: Any) -> Table:
    rows: list[Any] = [["conv1", 31.4, 2.5e-6], ["head", 12.0, 0.125]]
    return Table(**{"title": "Layers", "columns": ["layer", "SQNR, dB", "noise"], "rows": rows, **changed})


def with_table(shown: Table) -> Report:
    report = reports.full()
    for stage in report.stages:
        stage.tables = []
    report.stages[0].tables = [shown]
    return report


def pictures(text: str) -> list[str]:
    return re.findall(r'<svg[^>]*id="table-.*?</svg>', text, re.DOTALL)


def test_a_stage_leaves_a_table(project: Path) -> None:
    overrides = [
        "target.instruction_set=neon",
        "tracking=none",
        "measure.previews=false",
        "clip.limit=0.5",
        "pipeline=[clip,trace]",
    ]
    result = optpipe.optimize(recipe="clip_int8", overrides=overrides, config_dir="my_conf", output=project / "run")
    (found,) = Report.read(result.folder).stages[0].tables
    assert found == result.report.stages[0].tables[0]
    assert found.columns == ["tensor", "largest weight"] and len(found.rows) == 4
    assert all(isinstance(value, float) and value <= 0.5 for value in found.column("largest weight"))
    text = (result.folder / "report.html").read_text()
    assert "largest weight" in text and len(pictures(text)) == 1


def test_numbers_of_numpy_and_those_that_json_has_not(tmp_path: Path) -> None:
    rows = [["a", np.float32(1.5), np.int64(3)], ["b", float("inf"), None], ["c", float("nan"), -np.inf]]
    found = table(rows=rows)
    assert found.rows == [["a", 1.5, 3], ["b", "∞", None], ["c", "unknown", "−∞"]]
    with_table(found).write(tmp_path)
    assert Report.read(tmp_path).stages[0].tables == [found]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": [["conv1", 1.0]]}, "table 'Layers' has 3 columns, but a row of 2"),
        ({"rows": [["conv1", 1.0, [1]]]}, r"table 'Layers' holds \[1\] of type list; give a number"),
        ({"chart": ["SQNR"]}, "draws 'SQNR', which is none of its columns SQNR, dB, noise"),
        ({"chart": ["layer"]}, "draws 'layer', which is none"),
        ({"chart": [["noise"] * 4]}, "draws 4 columns in one picture; 3 at most"),
        ({"columns": ["layer", "noise", "noise"]}, "names the column 'noise' twice"),
    ],
)
def test_a_table_that_is_wrong_in_itself(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(**changed)


@pytest.mark.parametrize(
    ("cells", "shown"),
    [
        ([1, 20_000, -3], ["1", "20,000", "−3"]),
        ([31.44, 9.0, "∞", None, 0.0], ["31.4", "9.0", "∞", "–", "0"]),
        ([1.3, -0.0072], ["1.300", "−0.007"]),
        ([2.5e-6, 0.125], ["2.50 × 10⁻⁶", "1.25 × 10⁻¹"]),
        ([12345.0, 0.5], ["12,345", "0.500"]),
        (["Conv2d", None], ["Conv2d", "–"]),
    ],
)
def test_a_column_has_digits_that_can_be_compared(cells: list[Any], shown: list[str]) -> None:
    assert aligned(cells) == shown


def test_columns_are_drawn_beside_or_with_one_another(tmp_path: Path) -> None:
    shown = table(chart=["SQNR, dB", ["noise", "SQNR, dB"]])
    drawn = pictures(write_page(with_table(shown), tmp_path).read_text())
    assert len(drawn) == 2 and all('role="img"' in picture and "conv1" in picture for picture in drawn)
    assert drawn[0].count("<rect") == 2 and "series1" not in drawn[0]
    assert "<rect" not in drawn[1] and drawn[1].count('class="mark series1"') == 3  # too different for bars; legend


def test_over_numbers_a_column_is_a_line(tmp_path: Path) -> None:
    shown = table(columns=["bits", "lost"], rows=[[8, 0.1], [4, 2.0], [2, None]], chart=["lost"])
    (drawn,) = pictures(write_page(with_table(shown), tmp_path).read_text())
    assert 'class="trace series0"' in drawn and "bits →" in drawn


def test_a_long_table_is_folded_and_a_label_is_cut_in_its_middle(tmp_path: Path) -> None:
    shown = table(
        rows=[[name, 1e-9 * 3.0**i, 2e-9 * 3.0**i] for i, name in enumerate(LAYERS)], chart=[["SQNR, dB", "noise"]]
    )
    text = write_page(with_table(shown), tmp_path).read_text()
    assert "<summary>All 40 rows</summary>" in text and "39.attention.query</th>" in text
    assert re.search(r"encod[^<]*…[^<]*query<", pictures(text)[0])
    assert "trace" in pictures(write_page(with_table(replace(shown, rows=shown.rows * 2)), tmp_path).read_text())[0]


def test_a_column_without_numbers_is_not_drawn(tmp_path: Path) -> None:
    shown = table(rows=[["conv1", float("inf"), None]], chart=["SQNR, dB", "noise"])
    assert all(isinstance(drawn, NotMeasured) for drawn in View(shown, "t").pictures())
    assert "not measured: there is no number in noise" in page(with_table(shown), tmp_path)


def test_equal_numbers_and_one_row_are_drawn(tmp_path: Path) -> None:
    shown = table(columns=["bits", "lost", "won"], rows=[[8, 0.0, 5.0]], chart=["lost", ["lost", "won"]])
    bars = table(rows=[["conv1", 0.0, 0.0]], chart=["noise"])
    for one in (shown, bars):
        for drawn in pictures(write_page(with_table(one), tmp_path).read_text()):
            assert "nan" not in drawn and "inf" not in drawn

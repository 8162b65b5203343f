"""What the page, the comparison and their command line say."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reports

import optpipe
from optpipe.command import read as command_of
from optpipe.report import Final, Measurement, NotMeasured, Quality, Report
from optpipe.report.__main__ import main
from optpipe.report.compare import compare
from optpipe.report.console import disturbed
from optpipe.report.page import write_page
from optpipe.report.runs import read

QUICK = ("target.instruction_set=neon", "tracking=none", "measure.previews=false")


def page(report: Report, folder: Path) -> str:
    """The page's text, as a reader sees it."""
    parser = Reader()
    parser.feed(write_page(report, folder).read_text())
    return re.sub(r"\s+", " ", " ".join(parser.texts))


class Reader(HTMLParser):
    """Collects the text and checks that every element is closed."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag != "script"
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def test_a_run_leaves_a_page_that_needs_nothing_else(project: Path) -> None:
    overrides = [*QUICK, "clip.limit=0.5", "pipeline=[simplify,clip,trace]"]
    result = optpipe.optimize(recipe="clip_int8", overrides=overrides, config_dir="my_conf", output=project / "run")
    text = (result.folder / "report.html").read_text()
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?(https?:|//)|@import|url\(", text)
    assert "clip_int8" in text and "instruction set is neon" in text
    said = html.unescape(text)
    assert "Called from Python: optpipe.optimize(recipe='clip_int8', overrides=['target.instruction_set=neon'" in said
    assert "config_dir='my_conf'" in said
    assert Report.read(result.folder).command == result.report.command


def test_a_run_that_fails_leaves_a_page_that_says_why(project: Path) -> None:
    with pytest.raises(optpipe.StageError):
        optpipe.optimize(
            recipe="clip_int8",
            overrides=[*QUICK, "+clip@broken=broken", "pipeline=[simplify,broken]"],
            config_dir="my_conf",
            output=project / "run",
        )
    text = html.unescape((project / "run" / "report.html").read_text())
    assert "failed" in text and "raised KeyError" in text and "the run ended at step" in text


def test_the_command_that_repeats_a_run(optpipe: Any) -> None:
    words = ["+recipe=clip_int8", *QUICK, "budget.size_bytes=10", "pipeline=[trace,export]"]
    done = optpipe("--config-dir", "my_conf", *words)
    assert done.code == 0, done.err
    assert f"page: outputs/runs/{done.run.name}/report.html" in done.out.replace(str(done.folder) + "/", "")
    repeated = shlex.split(done.report["command"])
    assert repeated[:3] == ["python", "-m", "optpipe"]
    assert command_of(repeated[3:]).overrides == words
    assert command_of(repeated[3:]).config_dir == Path("my_conf")
    again = optpipe(*repeated[3:], "dry_run=true")
    assert again.code == 0 and "1. trace" in again.out
    page = html.unescape((done.run / "report.html").read_text())
    assert done.report["command"] in page and "over budget" in page


def test_a_command_is_quoted_for_a_shell() -> None:
    command = command_of(["--multirun", "+recipe=a", "x=1,2", "--config-dir", "my conf"])
    line = command.again(["+recipe=a", "x=1", "name='it is $HOME'"])
    assert shlex.split(line)[3:] == ["+recipe=a", "x=1", "name='it is $HOME'", "--config-dir", "my conf"]
    assert "multirun" not in line


def test_a_report_reads_as_it_was_written(tmp_path: Path) -> None:
    for number, report in enumerate((reports.full(), reports.empty())):
        folder = tmp_path / str(number)
        folder.mkdir()
        report.write(folder)
        assert Report.read(folder) == report


def test_every_part_of_a_run_is_on_the_page(tmp_path: Path) -> None:
    text = page(reports.full(), reports.write_run(tmp_path / "run", reports.full()))
    for said in (
        "4.00 × smaller", "100 KB → 25.0 KB", "4.00 × faster", "2.00 × faster", "−1.00 points",
        "[−2.00, 0.00]", "no difference can be told",  # headline
        "↩ rolled back", "= unchanged", "reused from an earlier run", "dynamic", "no linear layer",
        "scheme", "u8s8", "Every layer alone", "Conv2d", "31.4", "2.50 × 10⁻⁶", "∞", "Low is bad.",  # a table of a step
        "0.5, 0.25", "quality_drop was 3.00 points",  # steps
        "0.800 [0.780, 0.820]", "▼ slower", "4,321", "12.5 ms", "3.25 ms", "60.0 MB", "4.20 mJ",  # calls
        "3,456", "1.12 of the first’s",  # callers, sustained
        "quality_drop is 3.00 points, above 2.00", "✗ no , undecided",  # budget
        "call overhead", "31.0 %", "an empty graph takes 0.15 ms", "big batches",  # findings
        "60.0 %", "compute binds", "5.60 M operations", "410 KB",  # roofline
        "/conv1/Conv_quant", "QLinearConv", "5.00 M", "not counted for this kind of operator",  # layers
        "Right only now: 3", "in the model as it came in: 7", "p = 0.340", "By class", "cat", "By light",
        "not measured: 3 samples are too few",  # quality
        "Some CPU", "avx2, fma", "torch 2.13.0", "pets 1", "python -m optpipe +recipe=mine prune.ratio=0.3",
    ):  # fmt: skip
        assert said.replace(" , ", ", ") in text.replace(" , ", ", "), said


def test_what_is_missing_says_why(tmp_path: Path) -> None:
    text = page(reports.empty(), tmp_path)
    assert "✗ failed" in text and "stage 'export/onnx' raised KeyError" in text
    assert text.count("not measured: no instrument") > 5
    assert text.count("not measured: the run ended before") > 3
    for said in ("No limits were set", "no findings", "does not say what started the run"):
        assert said in text


def test_nothing_measured_of_the_final_model(tmp_path: Path) -> None:
    nothing = NotMeasured("no instrument")
    bare = Measurement(size_bytes=nothing, quality=nothing, latency=nothing, peak_memory_bytes=nothing)
    text = page(replace(reports.full(), final=Final(artifact="model/a.onnx", measurement=bare)), tmp_path)
    assert "only the final model's is computed" in text and "not asked for" in text
    assert text.count("no instrument") > 6


def test_the_compressed_size_stands_beside_the_size(tmp_path: Path) -> None:
    report = replace(reports.full(), baseline=replace(reports.baseline(), compressed_bytes=90_000))
    small = replace(reports.measurement(), compressed_bytes=11_000)
    text = page(replace(report, final=Final(artifact="model/a.onnx", measurement=small)), tmp_path)
    assert "compressed for download 90.0 KB → 11.0 KB" in text and "100 KB, 90.0 KB compressed" in text


def test_users_text_is_not_markup(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script><img src=x onerror=alert(1)>\" onload=\"1"
    report = reports.full()
    report.recipe, report.error, report.command, report.status = evil, evil, evil, "failed"
    report.notes, report.environment = [evil], {"cpu": evil, evil: [evil]}
    stage = report.stages[0]
    stage.key, stage.stage, stage.notes, stage.facts = evil, evil, [evil], {evil: {"deep": [{evil: evil}]}}
    assert isinstance(report.final, Final)
    report.final = replace(report.final, artifact=evil)
    text = write_page(report, tmp_path).read_text()
    assert "<script" not in text and "<img" not in text
    assert not re.search(r"<[^>]*\son(load|error)\s*=", text)
    assert "alert('x')" in page(report, tmp_path)


def test_pictures_are_described_and_hold_every_step(tmp_path: Path) -> None:
    text = write_page(reports.full(), reports.write_run(tmp_path / "run", reports.full())).read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 8
    for picture in pictures:
        assert 'role="img"' in picture and "<title" in picture and "nan" not in picture and "inf" not in picture
    for key in ("prune", "prune_more (rolled back)", "quantize"):
        assert all(key in picture for picture in pictures[:3])


def test_an_interval_without_an_end_is_drawn_and_said(tmp_path: Path) -> None:
    report = reports.full()
    assert isinstance(report.final, Final)
    open_ended = reports.latency(speedup_ci95=(0.0, float("inf")), verdict="same")
    report.stages[0].measurement = reports.measurement(latency=[open_ended])
    text = write_page(report, tmp_path).read_text()
    assert "[0, ∞]" in text and 'x2="inf"' not in text and 'x2="nan"' not in text


def test_a_damaged_samples_file_leaves_the_page_whole(tmp_path: Path) -> None:
    folder = reports.write_run(tmp_path / "run", reports.full())
    (folder / "samples" / "last_b1.npz").write_bytes(b"PK\x03\x04 cut off")
    assert "median 0.500 ms" in page(Report.read(folder), folder)


def test_the_page_of_a_run_is_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = reports.write_run(tmp_path / "run", reports.full())
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "quantize/static" in out and f"page: {folder / 'report.html'}" in out
    assert (folder / "report.html").stat().st_size > 10_000


def test_the_runs_of_a_sweep_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, ratio in ((2, "0.3"), (10, "0.5")):
        report = reports.full()
        report.overrides = ["+recipe=mine", f"prune.ratio={ratio}", "seed=0"]
        write_page(report, reports.write_run(tmp_path / "sweep" / str(number), report))
    reports.empty().write(_folder(tmp_path / "sweep" / "11"))
    (_folder(tmp_path / "sweep" / "12") / "report.json").write_text('{"schema": 1, "rec')
    assert main([str(tmp_path / "sweep")]) == 0
    out, text = capsys.readouterr().out, (tmp_path / "sweep" / "sweep.html").read_text()
    assert "prune.ratio" in out and "0.3" in out and "0.5" in out and out.index("0.3") < out.index("0.5")
    assert "4.00 [3.90, 4.10]" in out and "✗ failed" in out and "raised KeyError" in out
    assert "12/report.json cannot be read" in out and "seed" in out  # the run without overrides has no seed
    assert text.count("<circle") == 2 and "<figcaption>" in text  # of the runs whose figures are known
    assert 'href="10/report.html"' in text and 'href="11/' not in text and "✗ failed" in text


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_a_faster_run_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = reports.write_run(tmp_path / "a", reports.full(), final_ms=0.5)
    b = reports.write_run(tmp_path / "b", reports.full(), final_ms=0.4, seed=1)
    found = compare(read(a), read(b))
    for test in (found.speedups, found.times):
        assert not isinstance(test, NotMeasured)
        assert test.ci95[0] < 1.25 < test.ci95[1] and test.ci95[0] > 1
        assert isinstance(test.p, float) and test.p < 0.01 and test.n == (5, 5)
        assert isinstance(test.cohens_d, float) and test.cohens_d > 2
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "Trust the first most" in out and "n 5 and 5 replicas" in out and "p < 0.001 (Welch)" in out


def test_a_machine_that_slows_down_is_cancelled_by_the_baseline(tmp_path: Path) -> None:
    a = reports.write_run(tmp_path / "a", reports.full())
    b = reports.write_run(tmp_path / "b", reports.full(), eager_ms=3.0, final_ms=0.75, seed=1)
    found = compare(read(a), read(b))
    assert not isinstance(found.speedups, NotMeasured) and not isinstance(found.times, NotMeasured)
    assert found.speedups.ci95[0] < 1 < found.speedups.ci95[1]
    assert found.times.ci95[1] < 0.75


def test_runs_of_different_machines_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = reports.write_run(tmp_path / "a", reports.full())
    other = {**reports.ENVIRONMENT, "cpu": "Other CPU", "cores": 2}
    b = reports.write_run(tmp_path / "b", replace(reports.full(), environment=other))
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "measured on different machines: cpu Some CPU / Other CPU; cores 4 / 2" in out
    assert out.count("latency of the two cannot be compared") == 3 and "replicas (fresh" in out
    assert main([str(a), str(b), str(a)]) == 0
    assert "measured on different machines" in capsys.readouterr().out


def test_other_builds_are_flagged_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = reports.write_run(tmp_path / "a", reports.full())
    newer = {**reports.ENVIRONMENT, "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"}}
    b = reports.write_run(tmp_path / "b", replace(reports.full(), environment=newer))
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "other builds: onnxruntime 1.31.0 / 1.32.0" in out and "no difference can be told" in out


def test_quality_is_paired_on_the_same_data_only(tmp_path: Path) -> None:
    scores = np.r_[np.ones(90), np.zeros(10)]
    a, b = (reports.write_run(tmp_path / name, reports.full()) for name in "ab")
    reports.write_scores(a, scores)
    reports.write_scores(b, np.r_[np.ones(88), np.zeros(12)])
    paired = compare(read(a), read(b))
    assert paired.paired and not isinstance(paired.quality, NotMeasured)
    assert paired.quality.value == pytest.approx(-0.02)
    other = json.loads((b / "report.json").read_text()) | {"data_fingerprint": "pets 2"}
    (b / "report.json").write_text(json.dumps(other))
    independent = compare(read(a), read(b))
    assert not independent.paired and not isinstance(independent.quality, NotMeasured)
    assert isinstance(independent.quality.p, float) and independent.quality.p > 0.5
    widths = [test.quality.ci95[1] - test.quality.ci95[0] for test in (paired, independent)]
    assert widths[0] < widths[1]
    assert any("pets 2" in said for said in independent.baselines)


def test_a_difference_has_the_unit_of_its_metric(tmp_path: Path) -> None:
    report = reports.full()
    assert isinstance(report.final, Final) and isinstance(report.final.measurement.quality, Quality)
    errors = replace(report.final.measurement.quality, metric="mae", unit="value", higher_is_better=False)
    report.final = replace(report.final, measurement=replace(report.final.measurement, quality=errors))
    a, b = (reports.write_run(tmp_path / name, report) for name in "ab")
    for folder in (a, b):
        reports.write_scores(folder, np.linspace(0.0009, 0.0011, 100))
    found = compare(read(a), read(b)).quality
    assert not isinstance(found, NotMeasured) and found.ci95 == pytest.approx((0, 0))


def test_a_comparison_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, report in (("a", reports.full()), ("b", reports.full()), ("c", reports.empty())):
        report.write(_folder(tmp_path / name))
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "A's folder does not hold the times of its calls" in out and "no quality/final.npz" in out
    assert main([str(tmp_path / "a"), str(tmp_path / "c")]) == 0
    assert "different machines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no report.json in"),
        ('{"schema": 1, "recipe": "a", "over', "cannot be read"),
        ('{"schema": 99}', "is not a report of schema 1"),
        ("[]", "is not a report of schema 1"),
        ('{"schema": 1}', "does not fit schema 1"),
        (
            '{"schema": 1, "recipe": "a", "overrides": [], "environment": {}, "budget": 3, "stages": 5}',
            "cannot be read",
        ),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_folder_without_a_readable_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, said: str
) -> None:
    good = reports.write_run(tmp_path / "good", reports.full())
    folder = _folder(tmp_path / "bad")
    if content is not None:
        (folder / "report.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for words in ([str(folder)], [str(good), str(folder)]):
        assert main(words) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("error:") == 1 and "Traceback" not in err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_help_and_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ((["--help"], 0), ([], 2), (["--nonsense"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == code
    assert "compare run B with run A" in capsys.readouterr().out


def test_a_load_that_lasted_is_said() -> None:
    report = reports.full()
    assert disturbed(report) == []
    busy = reports.measurement(latency=[reports.latency(other_load_cores=1.2)])
    report.stages[0] = replace(report.stages[0], measurement=busy)
    (said,) = disturbed(report)
    assert said.startswith("prune: other programs kept up to 1.2 cores busy")

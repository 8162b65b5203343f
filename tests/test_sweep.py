"""Sweeps: the ledger, one failed job among others, going on after an end, several at once, and the front."""

from __future__ import annotations

import io
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import reports
from command import start
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import OmegaConf

from optpipe.command import read
from optpipe.compose import CONF, combinations, prepare
from optpipe.errors import RecipeError
from optpipe.report.console import show
from optpipe.report.front import best, front
from optpipe.report.runs import Run
from optpipe.report.scatter import drawn
from optpipe.sweep import Job, Ledger, State, alone, folder_for, left, view

WORDS = (
    "--multirun", "+recipe=clip_int8", "--config-dir", "my_conf", "target.instruction_set=neon", "tracking=none",
    "measure.previews=false", "rehearse=false", "pipeline=[clip,trace]",
)  # fmt: skip


def states(folder: Path) -> list[State]:
    return [job.state for job in Ledger(folder).jobs()]


def only(project: Path) -> Path:
    (folder,) = (project / "outputs" / "sweeps").iterdir()
    return folder


def test_one_failed_job_neither_stops_nor_hides_the_others(optpipe: Any, project: Path) -> None:
    words = (*WORDS, "clip.limit=0.5,1.0", "model.args.hidden=64,32")
    done = optpipe(*words)  # the weights file is of 64
    folder = only(project)
    assert done.code == 1
    assert states(folder) == [State.done, State.failed, State.done, State.failed]
    assert "job 1 failed: RecipeError" in done.err and "job 3 failed" in done.err and "does not fit" in done.err
    assert "[4 of 4 jobs] 3 failed, clip.limit=1.0 model.args.hidden=32" in done.err
    begun = [job.started for job in Ledger(folder).jobs()]
    again = optpipe(*words)  # the failed ones only, in the same folder
    assert only(project) == folder and again.code == 1
    assert "the sweep in" in again.err and "2 of its 4 jobs are not done" in again.err
    later = [job.started for job in Ledger(folder).jobs()]
    assert [before == after for before, after in zip(begun, later, strict=True)] == [True, False, True, False]


def test_a_sweep_that_was_killed_goes_on(project: Path, cache: Path) -> None:
    process = start(project, *WORDS, "clip.limit=0.2,0.4,0.6", cache=cache)
    until = time.monotonic() + 200
    while not any('"done"' in path.read_text() for path in project.glob("outputs/sweeps/*/jobs/0.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.communicate()
    folder = only(project)
    assert State.waiting in states(folder)
    first = (folder / "0" / "report.json").stat().st_mtime_ns
    done = start(project, *WORDS, "clip.limit=0.2,0.4,0.6", cache=cache)
    _, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert states(only(project)) == [State.done] * 3
    assert (folder / "0" / "report.json").stat().st_mtime_ns == first
    assert f"job 0 is done: {folder}/0" in err


def test_ctrl_c_is_one_message_and_the_same_command_goes_on(project: Path, cache: Path) -> None:
    words = (*WORDS, "clip.limit=0.3,0.5,0.7")
    process = start(project, *words, cache=cache)
    until = time.monotonic() + 200
    while not any('"running"' in path.read_text() for path in project.glob("outputs/sweeps/*/jobs/1.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in out + err and err.count("Interrupted") == 1
    assert "Interrupted; 2 of 3 jobs wait, and the same command goes on" in err
    assert states(only(project)) == [State.done, State.waiting, State.waiting]
    done = start(project, *words, cache=cache)
    _, err = done.communicate(timeout=300)
    assert done.returncode == 0 and "2 of its 3 jobs are not done" in err
    assert states(only(project)) == [State.done] * 3


def test_jobs_at_once_share_results_cores_and_a_run_in_mlflow(optpipe: Any, project: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from mlflow import MlflowClient

    tracked = [word for word in WORDS if word != "tracking=none"]
    done = optpipe(*tracked, "hydra/launcher=parallel", "clip.limit=0.5,1.0", "seed=0")
    assert done.code == 0, done.err
    assert states(only(project)) == [State.done] * 2
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("optpipe")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (sweep,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert sweep.info.run_name == only(project).name and sweep.info.status == "FINISHED"
    below = [run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    assert sorted(below) == ["0 clip.limit=0.5", "1 clip.limit=1.0"]
    assert [item.path for item in client.list_artifacts(sweep.info.run_id)] == ["sweep.html"]


KILLED = """
import os, pathlib, signal
from dataclasses import dataclass
from optpipe import register

@register("end/killed", takes="torch", gives="torch")
@dataclass(kw_only=True)
class Killed:
    times: int = 1

    def run(self, model, ctx):
        mark = pathlib.Path(f"killed_{self.times}")
        mark.write_text(mark.read_text() + "." if mark.exists() else ".")
        if len(mark.read_text()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return model
"""


@pytest.mark.slow  # four pairs of processes
def test_a_job_that_is_killed_beside_others_begins_again(optpipe: Any, project: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (project / "my_end.py").write_text(KILLED)
    (project / "my_conf" / "plugins.yaml").write_text("plugins: [my_stage, my_end]")
    words = [word for word in WORDS if not word.startswith("pipeline=")]
    chain = ("pipeline=[clip,end]", "+end=killed", "hydra/launcher=parallel", "end.times=1,9")
    ended = optpipe(*words, *chain)
    assert ended.code == 1 and "Traceback" not in ended.err
    assert states(only(project)) == [State.done, State.failed]
    assert Ledger(only(project)).job(1).reason == "its process was killed twice, beside others and alone"


def test_the_folder_is_one_sweeps(tmp_path: Path) -> None:
    folder_for(tmp_path / "a", ["seed=1,2"], [["seed=1"], ["seed=2"]], "it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").touch()
    with pytest.raises(RecipeError, match=r"run' holds other files; give the sweep a folder of its own"):
        folder_for(tmp_path / "run", ["seed=1,2"], [["seed=1"], ["seed=2"]], "it")
    with pytest.raises(RecipeError, match=r"holds another sweep \(seed=1,2\); give it a folder of its own"):
        folder_for(tmp_path / "a", ["seed=1,3"], [], "it")
    with alone(tmp_path / "a", "it"), pytest.raises(RecipeError, match="another process runs the sweep in"):
        with alone(tmp_path / "a", "it"):
            pass


def test_a_job_whose_process_has_ended_waits_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(["seed=1,2"], [["seed=1"], ["seed=2"]])
    with ledger.running(0, ["seed=1"]):
        assert [job.state for job in ledger.jobs()] == [State.running, State.waiting]
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    told = json.loads((tmp_path / "jobs" / "0.json").read_text())
    (tmp_path / "jobs" / "0.json").write_text(json.dumps({**told, "state": "running", "pid": process.pid}))
    (tmp_path / "jobs" / "1.json").write_text("{")  # cut off by a full disk
    assert [job.state for job in ledger.jobs()] == [State.waiting, State.waiting]


def test_a_ctrl_c_that_a_library_turns_into_its_own_error_is_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(["seed=1,2"], [["seed=1"], ["seed=2"]])
    with pytest.raises(KeyboardInterrupt), ledger.running(0, ["seed=1"]):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as pressed:
            raise RuntimeError("a callback failed") from pressed
    assert ledger.job(0).state is State.waiting


def test_a_job_is_not_taken_for_a_later_process_of_its_number(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(["seed=1,2"], [["seed=1"], ["seed=2"]])
    with ledger.running(0, ["seed=1"]):
        (job, _) = ledger.jobs()
        ledger.write(replace(job, started=job.started - 1e6))  # as when the machine began anew since
        assert [job.state for job in ledger.jobs()] == [State.waiting, State.waiting]


def test_a_job_whose_worker_is_known_to_have_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(["seed=1,2"], [["seed=1"], ["seed=2"]])
    elsewhere = Job(number=0, overrides=["seed=1"], state=State.running, host="another", pid=1, started=time.time())
    ledger.write(elsewhere)
    assert ledger.job(0).state is State.running  # from here nobody could tell
    assert ledger.died(0, "its worker died", again=True)
    assert ledger.job(0).state is State.waiting
    assert ledger.died(1, "its worker died") and "[1 of 2 jobs] 1 failed, seed=2: its worker" in capsys.readouterr().err
    assert (ledger.job(1).state, ledger.job(1).code) == (State.failed, 1)
    assert not ledger.died(1, "its worker died", again=True)  # it had said by itself what became of it


def test_the_rest_is_expected_to_take_as_long() -> None:
    done = [Job(number=i, state=State.done, seconds=60.0) for i in range(2)]
    assert left([*done, Job(number=2), Job(number=3)]) == "; about 2 min left"
    assert left(done) == ""


def test_jobs_are_numbered_as_hydra_does() -> None:
    words = ["--multirun", "+recipe=edge_int8", "prune.ratio=0.3,0.5", "seed=0,1", "hydra/launcher=parallel"]
    found = [job[1:] for job in combinations(read(words))]
    assert found == [
        ["prune.ratio=0.3", "seed=0"], ["prune.ratio=0.3", "seed=1"],
        ["prune.ratio=0.5", "seed=0"], ["prune.ratio=0.5", "seed=1"],
    ]  # fmt: skip


def ran(name: str, speed: float, size: int, delta: float, status: str = "ok") -> Run:
    """A run whose intervals are a tenth of its speed-up and half a point wide."""
    latency = reports.latency(speedup=speed, speedup_ci95=(0.95 * speed, 1.05 * speed))
    quality = reports.quality(delta=delta, delta_ci95=(delta - 0.0025, delta + 0.0025))
    final = reports.measurement(size_bytes=size, latency=[latency], quality=quality)
    return Run(name, Path(name), reports.of(final, status))


def test_jobs_that_differ_in_values_are_composed_once_and_as_hydra_does() -> None:
    asked: list[list[str]] = []

    class Loader:
        def load_sweep_config(self, master_config: Any, sweep_overrides: list[str]) -> Any:
            asked.append(sweep_overrides)
            return by_hydra(sweep_overrides)

    def by_hydra(overrides: list[str]) -> Any:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="optpipe"):
            return compose("config", overrides=["+recipe=edge_int8", *overrides], return_hydra_config=True)

    prepare(read(["--multirun"]))
    sweeper = Plugins.instance().class_name_to_class["hydra_plugins.optpipe_once.Once"](max_batch_size=None)
    config = by_hydra([])
    sweeper.setup(hydra_context=HydraContext(Loader(), callbacks=None), task_function=print, config=config)
    loader = sweeper.launcher.hydra_context.config_loader

    def job(*overrides: str) -> str:
        found, own = loader.load_sweep_config(config, list(overrides)), by_hydra(list(overrides))
        own.hydra.overrides.task.remove("+recipe=edge_int8")  # of the command, where Hydra sweeps
        own.hydra.job.override_dirname = own.hydra.job.override_dirname.replace("+recipe=edge_int8,", "")
        found.hydra.overrides.task = [text for text in found.hydra.overrides.task if "recipe" not in text]
        found.hydra.job.override_dirname = found.hydra.job.override_dirname.replace("+recipe=edge_int8,", "")
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(own)
        return str(found.hydra.job.override_dirname)

    names = {job(f"prune.ratio={ratio}", "quantize=static", f"seed={seed}") for ratio in (0.5, 0.6) for seed in (1, 2)}
    assert len(names) == 4 and asked == [["prune.ratio=0.5", "quantize=static", "seed=1"]]
    job("prune.ratio=0.6", "quantize=qat", "seed=1")  # another group's settings
    job("prune.keep=[a]", "prune.ratio=0.6", "prune.ratio=0.7")  # the last of two holds
    job("prune.keep=[a]", "prune.ratio=0.8", "prune.ratio=0.7")
    assert len(asked) == 4


def test_results_are_printed_above_the_live_table(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    terminal, result = Console(file=io.StringIO(), force_terminal=True, width=60), Table("size")
    result.add_row("37.0 KB")
    with Live("1 running", console=terminal, auto_refresh=False):
        show(result)
    assert "37.0 KB" in terminal.file.getvalue() and not capsys.readouterr().out


def test_a_running_job_shows_since_when() -> None:
    from rich.console import Console

    done = Job(number=0, overrides=["seed=0"], state=State.done, seconds=65.4)
    jobs = [done, Job(number=1, overrides=["seed=1"], state=State.running, started=time.time())]
    shown = Console(file=io.StringIO(), width=80)
    shown.print(view(jobs))
    assert "1 running, 1 done" in shown.file.getvalue() and "65 s" in shown.file.getvalue()
    assert f"since {time.localtime(jobs[1].started).tm_hour:02}:" in shown.file.getvalue()


def test_the_front_holds_what_nothing_beats() -> None:
    fast, small = ran("fast", 10, 50_000, -0.01), ran("small", 5, 10_000, -0.01)
    good, twin = ran("good", 2, 90_000, 0.0), ran("twin", 10.2, 50_000, -0.012)
    beaten = ran("beaten", 4, 60_000, -0.02)
    names = [[found.run.name for found in group] for group in front([good, beaten, fast, small, twin])]
    assert names == [["twin", "fast"], ["small"], ["good"]]


def test_the_best_keeps_its_budget() -> None:
    over, fast, small = (
        ran("over", 20, 10_000, -0.1, "over_budget"), ran("fast", 10, 50_000, -0.01), ran("small", 9.9, 40_000, -0.01)
    )  # fmt: skip
    found = best([over, fast, small])
    assert found is not None and found.name == "small"  # as fast as can be told
    assert best([over]) is None


Place = tuple[float, float, float]  # to the right, up, radius


def marks(runs: Sequence[Run]) -> tuple[ElementTree.Element, dict[str, Place], dict[str, set[str]]]:
    """The picture of `runs`, where each run's circle is in it, and the classes of every mark."""
    picture = drawn(runs)
    assert picture is not None and "nan" not in picture and "inf" not in picture
    root = ElementTree.fromstring(picture)
    places, classes = {}, {}
    for parent in root:
        if (title := parent.find("title")) is None or not title.text:
            continue
        name = title.text.split(":")[0]
        mark = parent.find("path") if parent.tag == "g" else parent
        assert mark is not None
        classes[name] = set(mark.attrib["class"].split())
        if mark.tag == "circle":
            x, y, radius = (float(mark.attrib[key]) for key in ("cx", "cy", "r"))
            places[name] = (x, -y, radius)
    return root, places, classes


def test_the_front_is_drawn() -> None:
    fast, small, good = ran("fast", 10, 40_000, -0.01), ran("small", 5, 10_000, -0.01), ran("good", 2, 90_000, 0.0)
    twin, beaten = ran("twin", 10.2, 40_000, -0.012), ran("beaten", 4, 60_000, -0.02)
    root, places, classes = marks([good, beaten, fast, small, twin])
    assert root.attrib["role"] == "img" and set(places) == {"fast", "small", "good", "twin", "beaten"}
    assert {name for name in classes if "best" in classes[name]} == {"fast", "small", "good", "twin"}
    labels = root.findall("text[@class='label']")
    assert sorted(label.text or "" for label in labels) == ["fast", "good", "small", "twin"]
    assert len({(label.attrib["x"], label.attrib["y"]) for label in labels}) == 4
    assert sorted(places, key=lambda name: places[name][0]) == ["good", "beaten", "small", "fast", "twin"]
    up = {name: place[1] for name, place in places.items()}
    assert up["good"] > up["fast"] == up["small"] > up["twin"] > up["beaten"]
    assert math.isclose(places["fast"][2], 2 * places["small"][2], rel_tol=0.01)  # 4 times the area
    (joined,) = root.findall("path[@class='alike']")
    ends = [places["fast"][:2], places["twin"][:2]]
    assert joined.attrib["d"] == " L".join(f"{x:g} {-y:g}" for x, y in ends).join(["M", ""])
    assert len(root.findall("line[@class='cross best']")) == 8 and len(root.findall("line[@class='cross']")) == 2


def test_the_limits_are_drawn_and_what_is_far_beyond_them_points_there() -> None:
    runs = [
        ran("in", 4, 50_000, -0.005),
        ran("over", 6, 50_000, -0.03, "over_budget"),
        ran("lost", 40, 9_000, -0.8, "over_budget"),
    ]
    for run in runs:
        run.report.budget = replace(run.report.budget, limits={"quality_drop": 0.02, "speedup": 3.0, "size_bytes": 1e6})
    root, places, classes = marks(runs)
    assert "lost" not in places and "over" in classes["lost"] & classes["over"] and "over" not in classes["in"]
    across, upright = root.findall("line[@class='limit']")
    assert places["over"][1] < -float(across.attrib["y1"]) < places["in"][1]
    assert float(upright.attrib["x1"]) < places["in"][0]
    assert "chosen" in classes["in"] and "chosen" not in classes["over"] | classes["lost"]
    runs[0].report.budget.limits["quality_drop"] = 0.01  # no limit of all any more
    assert len(marks(runs)[0].findall("line[@class='limit']")) == 1


def test_better_is_above_whichever_way_the_metric_points() -> None:
    def erring(name: str, delta: float, **changed: Any) -> Run:
        quality = reports.quality(metric="mae", unit="value", delta=delta, delta_ci95=(delta - 1, delta + 1), **changed)
        open_ended = reports.latency(speedup_ci95=(0.0, math.inf))
        final = reports.measurement(quality=quality, latency=[open_ended])
        return Run(name, Path(name), reports.of(final, "ok"))

    _, places, _ = marks([erring("worse", 2.0, higher_is_better=False), erring("better", -2.0, higher_is_better=False)])
    assert places["better"][1] > places["worse"][1]
    assert drawn([erring("one", 1.0, higher_is_better=False), ran("accuracy", 2, 10, 0.0)]) is None
    assert drawn([erring("one", 1.0)]) is None and drawn([]) is None

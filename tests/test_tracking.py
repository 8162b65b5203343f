"""MLflow: any server, none of which can cost a run its result, and what it missed is delivered later, once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import my_network
import pytest
import reports

import optpipe
from optpipe import register
from optpipe.errors import EXIT_INTERRUPTED
from optpipe.report.__main__ import main as report_command
from optpipe.sweep import Ledger, State
from optpipe.tracking.__main__ import main as tracking_command
from optpipe.tracking.delivery import Delivery
from optpipe.tracking.journal import Journal
from optpipe.tracking.live import finish_sweep

QUICK = ("target.instruction_set=neon", "measure.previews=false", "rehearse=false", "pipeline=[clip,between,clip_more]")
BETWEEN: list[Callable[[], None]] = []  # what happens while the second of the three steps runs


@register("between/call", takes="torch", gives="torch")
@dataclasses.dataclass(kw_only=True)
class Call:
    """Does what the test wants to happen in the middle of a run."""

    def run(self, model: Any, ctx: Any) -> Any:
        for call in BETWEEN:
            call()
        ctx.record(**{"odd [name]": (1, 2)})
        return model


class Server:
    """A real `mlflow server` with one worker and a database in `folder`."""

    def __init__(self, folder: Path, database: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self._words = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(folder / "artifacts"),
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> str:
        """Running, whatever happened to it; its address."""
        if self.process is None:
            self._start()
        return self.uri

    def _start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                runs_at(self.uri)  # the first question opens its database
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number: int) -> None:
        """To the server and the worker that it started."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    database = folder / "server.db"
    database.write_bytes(empty_mlflow.read_bytes())
    made = Server(folder, database)
    yield made
    if made.process is not None:
        made.signal(signal.SIGKILL)


@pytest.fixture
def store(tmp_path: Path, empty_mlflow: Path) -> str:
    """A database of this test's own."""
    database = tmp_path / "own.db"
    database.write_bytes(empty_mlflow.read_bytes())
    return f"sqlite:///{database}"


@pytest.fixture(autouse=True)
def nothing_between() -> Iterator[None]:
    yield
    BETWEEN.clear()


def run(project: Path, name: str, uri: str, *overrides: str) -> Path:
    """The folder of a real run in this process, tracked at `uri`."""
    task = my_network.pixels()
    task.fingerprint = "scikit-learn digits"
    words = [*QUICK, "+between=call", "+clip@clip_more=weights", f"tracking.uri={uri}", *overrides]
    words.append(f"store.folder={project / 'kept'}")
    folder = project / name
    optpipe.optimize(task=task, recipe="clip_int8", overrides=words, config_dir="my_conf", output=folder)
    return folder


def push(*words: object) -> int:
    return tracking_command(["push", *map(str, words)])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def runs_at(uri: str) -> list[Any]:
    """Every run of the experiment, the first first."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("optpipe")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id], order_by=["start_time"]))


def content(uri: str, folder: Path) -> dict[str, Any]:
    """What MLflow shows of the run in `folder`, without what differs between two deliveries: its ids and its times."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = {found.info.run_id: found for found in runs_at(uri)}
    parent = runs[report_of(folder)["mlflow_run_id"]]
    nested = [found for found in runs.values() if found.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    nested.sort(key=lambda found: int(found.data.tags["optpipe.position"]))
    own = ("mlflow.parentRunId", "optpipe.run", "optpipe.computed_by", "mlflow.runName")
    shown = {}
    for name, found in (("", parent), *((one.info.run_name, one) for one in nested)):
        history = {
            key: [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, key)]
            for key in found.data.metrics
        }
        tags = {key: value for key, value in found.data.tags.items() if key not in own}
        artifacts = sorted(item.path for item in client.list_artifacts(found.info.run_id))
        shown[name] = (found.info.status, history, found.data.params, tags, artifacts)
    return shown


def test_a_real_server_has_the_run_its_stages_hashes_and_files(project: Path, server: Server) -> None:
    from mlflow import MlflowClient

    first, second = run(project, "a", server.up()), run(project, "b", server.uri)
    shown, again = content(server.uri, first), content(server.uri, second)
    assert list(shown) == ["", "clip", "between", "clip_more"]
    status, _, params, tags, artifacts = shown[""]
    assert (status, artifacts) == ("FINISHED", ["config.json", "model", "report.html", "report.json"])
    manifest = json.loads((first / "model" / "manifest.json").read_text())
    deployed = Path(report_of(first)["final"]["artifact"]).name
    assert tags["optpipe.sha256"] == manifest["files"][deployed]["sha256"]
    assert params["clip.limit"] == "1.0"
    stages = report_of(first)["stages"]
    for stage in stages:
        status, figures, _, tags, artifacts = shown[stage["key"]]
        assert (status, artifacts) == ("FINISHED", [])
        assert figures["size_bytes"] == [(0, stage["measurement"]["size_bytes"])]
        assert tags["optpipe.sha256"] == stage["model_sha256"] and tags["optpipe.store_key"] == stage["store_key"]
        assert (tags["optpipe.reused"], again[stage["key"]][3]["optpipe.reused"]) == ("false", "true")
    assert shown["between"][2]["odd _name_"] == "[1, 2]"
    client, runs = MlflowClient(server.uri), {found.info.run_id: found for found in runs_at(server.uri)}
    for found in runs.values():
        if computed_by := found.data.tags.get("optpipe.computed_by"):
            assert runs[computed_by].data.tags["mlflow.parentRunId"] == report_of(first)["mlflow_run_id"]
            assert runs[computed_by].info.run_name == found.info.run_name
    assert sum("optpipe.computed_by" in found.data.tags for found in runs.values()) == 3
    uploaded = client.download_artifacts(report_of(first)["mlflow_run_id"], "report.json", str(project))
    assert Path(uploaded).read_bytes() == (first / "report.json").read_bytes()


def test_a_server_that_dies_in_the_middle_costs_nothing_and_is_given_the_rest_once(
    project: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    BETWEEN.append(lambda: server.signal(signal.SIGKILL))
    before = len(runs_at(server.up()))
    folder = run(project, "a", server.uri)
    BETWEEN.clear()
    report, said = report_of(folder), capsys.readouterr().err
    assert [stage["status"] for stage in report["stages"]] == ["unchanged", "unchanged", "unchanged"]
    assert (folder / "model" / "manifest.json").exists() and report["status"] == "ok"
    assert said.count("tracking: ") == 1
    assert (
        f"{server.uri} failed (ConnectionRefusedError" in said and f"python -m optpipe.tracking push {folder}" in said
    )
    assert push(folder) == 1
    failed = capsys.readouterr().err
    assert "is not delivered" in failed and "ConnectionRefusedError" in failed and failed.count("\n") == 1
    server.up()
    assert len(runs_at(server.uri)) == before + 2  # the run and its first stage
    assert push(folder) == 0
    run_id = report["mlflow_run_id"]
    assert f"delivered as run {run_id}" in capsys.readouterr().out
    assert push(folder) == 0
    assert f"already delivered as run {run_id}" in capsys.readouterr().out
    assert len(runs_at(server.uri)) == before + 4
    status, history, *_ = content(server.uri, folder)[""]
    assert status == "FINISHED"
    assert [step for step, _ in history["size_bytes"]] == [0, 1, 2, 3]


def test_a_server_that_hangs_costs_seconds(
    project: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")  # the user's own, instead of 8
    server.up()
    BETWEEN.append(lambda: server.signal(signal.SIGSTOP))
    begin = time.monotonic()
    folder = run(project, "a", server.uri)
    server.signal(signal.SIGCONT)
    assert time.monotonic() - begin < 60
    assert report_of(folder)["status"] == "ok" and capsys.readouterr().err.count("tracking: ") == 1
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "2" and "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:////dev/null/mlflow.db"])
def test_a_run_that_found_no_store_is_delivered_as_if_it_had(
    uri: str, project: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    folder = run(project, "a", uri)
    assert time.monotonic() - begin < 30
    report = report_of(folder)
    assert report["status"] == "ok" and report["mlflow_run_id"] == "" and "not_measured" not in report["final"]
    said = capsys.readouterr().err
    assert said.count("tracking: ") == 1 and f"tracking: {uri} failed (" in said
    assert push(folder, "--uri", store) == 0
    assert report_of(folder)["mlflow_run_id"] == runs_at(store)[0].info.run_id
    assert len(runs_at(store)) == 4


def test_what_is_pushed_is_what_the_tracker_makes(project: Path, store: str, empty_mlflow: Path) -> None:
    live = run(project, "a", store)
    expected = content(store, live)
    untracked = run(project, "b", store, "tracking=none")
    shutil.copy(empty_mlflow, project / "other.db")
    other = f"sqlite:///{project / 'other.db'}"
    forget_delivery(live)
    assert push(live, untracked, "--uri", other) == 0
    assert content(other, live) == expected
    status, _, params, tags, artifacts = content(other, untracked)[""]
    assert (status, artifacts) == (expected[""][0], expected[""][4])
    assert set(params) == set(expected[""][2]) and set(tags) == set(expected[""][3])
    assert push(untracked) == 0 and len(runs_at(other)) == 8


def test_a_run_that_was_killed_at_its_very_end_is_taken_from_its_report(
    project: Path, store: str, empty_mlflow: Path
) -> None:
    folder = run(project, "a", store)
    journal = Journal(folder)
    journal.replace(journal.read()[:4])
    shutil.copy(empty_mlflow, project / "other.db")
    other = f"sqlite:///{project / 'other.db'}"
    assert push(folder, "--uri", other) == 0
    assert list(content(other, folder)) == ["", "clip", "between", "clip_more"]
    assert content(other, folder)[""][0] == "FINISHED"


def test_a_push_that_is_interrupted_anywhere_is_completed_by_the_next(
    project: Path,
    store: str,
    empty_mlflow: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run(project, "a", store)
    expected = content(store, folder)
    forget_delivery(folder)
    shutil.copy(empty_mlflow, project / "other.db")
    other = f"sqlite:///{project / 'other.db'}"
    log = Delivery._log
    for reached in (0, 2, 4, 7, 11):
        calls = iter(range(reached))

        def interrupted(*words: Any, calls: Any = calls, **more: Any) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            log(*words, **more)

        monkeypatch.setattr(Delivery, "_log", interrupted)
        assert push(folder, "--uri", other) == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert push(folder, "--uri", other) == 0
    assert len(runs_at(other)) == 4
    assert content(other, folder) == expected
    assert push(folder, "--uri", other) == 0
    assert push(folder, "--uri", store) == 1
    assert "goes to one place only; nothing was delivered to" in capsys.readouterr().err


def test_what_cannot_be_pushed_is_refused_in_one_message(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(project, "a", "http://127.0.0.1:9")
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    journal = Journal(folder)
    with journal.alone():
        assert_refused(capsys, "is being delivered by its run or another push", folder)
    for words, said in [
        ((tmp_path / "nowhere",), "there is no folder"),
        ((tmp_path / "empty",), "there is no report.json in"),
        (
            (folder, "--uri", "htp://127.0.0.1"),
            "--uri is 'htp://127.0.0.1', and MLflow has no 'htp' store; did you mean",
        ),
        ((folder,), "http://127.0.0.1:9 failed (ConnectionRefusedError"),
    ]:
        assert_refused(capsys, said, *words)
    journal.path.write_text("{")
    assert_refused(capsys, "tracking.jsonl is damaged", folder)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("htp://127.0.0.1:5000", "MLflow has no 'htp' store; did you mean 'http'?"),
        ("http:/127.0.0.1:5000", "names no server; use http://HOST:PORT"),
        ("http://me:secret@127.0.0.1:five", "uri is 'http://127.0.0.1:five', which is no address"),
        ("postgresql+nothing://127.0.0.1/x", "what connects to it is not installed"),
    ],
)
def test_an_address_that_is_wrong_in_itself_is_refused_before_the_run(uri: str, said: str, project: Path) -> None:
    with pytest.raises(optpipe.RecipeError, match=re.escape(said)):
        run(project, "a", uri)
    assert not (project / "a" / "report.json").exists()


def begun(project: Path) -> Ledger:
    """A sweep of two jobs, none of which has run."""
    ledger = Ledger(project / "sweep")
    ledger.begin(["+recipe=clip_int8", "clip.limit=0.1,0.2"], [["clip.limit=0.1"], ["clip.limit=0.2"]])
    return ledger


def job(ledger: Ledger, number: int, project: Path, uri: str) -> None:
    """A real run in this process as one of a sweep's jobs."""
    folder = ledger.folder / str(number)
    with ledger.running(number, [], folder):
        run(project, str(folder), uri, *ledger.job(number).overrides)


def tree(uri: str) -> dict[str, list[str]]:
    """Names of the runs below each, with how they ended; those at the top are below \"\"."""
    runs = runs_at(uri)
    names = {found.info.run_id: found.info.run_name for found in runs}
    found: dict[str, list[str]] = {}
    for one in runs:
        above = names.get(one.data.tags.get("mlflow.parentRunId", ""), "")
        found.setdefault(above, []).append(f"{one.info.run_name} {one.info.status}")
    return found


def test_a_sweep_that_found_no_store_is_pushed_with_its_jobs_once(
    project: Path, store: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    ledger = begun(project)
    job(ledger, 0, project, "http://127.0.0.1:9")
    BETWEEN.append(lambda: [].pop())
    job(ledger, 1, project, "http://127.0.0.1:9")
    capsys.readouterr()
    caplog.set_level("INFO", "optpipe")
    caplog.clear()
    finish_sweep(ledger.folder)
    assert not caplog.records  # Hydra shows them, once it has run the jobs
    said = capsys.readouterr().err
    assert (
        said.count("tracking: ") == 1 and f"deliver the sweep later: python -m optpipe.tracking push {project}" in said
    )
    assert push(ledger.folder) == 1
    assert capsys.readouterr().err.count("is not delivered") == 1  # nor are the others tried
    assert push(ledger.folder, "--uri", store) == 0
    assert capsys.readouterr().out.count(": delivered as run") == 3
    expected = {
        "": ["sweep FAILED"], "sweep": ["0 clip.limit=0.1 FINISHED", "1 clip.limit=0.2 FAILED"],
        "0 clip.limit=0.1": ["clip FINISHED", "between FINISHED", "clip_more FINISHED"],
        "1 clip.limit=0.2": ["clip FINISHED", "between FAILED"],
    }  # fmt: skip
    assert tree(store) == expected
    (parent,) = [found for found in runs_at(store) if "optpipe.sweep" in found.data.tags]
    assert parent.data.tags["optpipe.command"] == "python -m optpipe +recipe=clip_int8 clip.limit=0.1,0.2"
    assert parent.data.metrics == {
        "jobs": 2,
        "jobs_done": 1,
        "jobs_failed": 1,
        "jobs_stopped": 0,
    }  # the target cannot be timed here
    assert push(ledger.folder) == 0
    assert capsys.readouterr().out.count(": already delivered as run") == 3 and tree(store) == expected


def test_a_sweep_that_goes_on_stays_one_run(project: Path, store: str) -> None:
    from mlflow import MlflowClient

    ledger = begun(project)
    job(ledger, 0, project, store)

    def interrupted() -> None:
        raise KeyboardInterrupt

    BETWEEN.append(interrupted)
    with pytest.raises(KeyboardInterrupt):
        job(ledger, 1, project, store)
    finish_sweep(ledger.folder)
    assert tree(store)[""] == ["sweep KILLED"]
    (attempt,) = [found for found in runs_at(store) if found.info.run_name.startswith("1 ")]
    MlflowClient(store).update_run(attempt.info.run_id, "RUNNING")  # as kill -9 leaves it
    BETWEEN[:] = [lambda: during.append(tree(store)[""])]
    during: list[list[str]] = []
    shutil.rmtree(ledger.folder / "1")
    job(ledger, 1, project, store)
    finish_sweep(ledger.folder)
    assert during == [["sweep RUNNING"]]
    assert [entry.state for entry in ledger.jobs()] == [State.done, State.done]
    found = tree(store)
    assert found[""] == ["sweep FINISHED"]
    assert found["sweep"] == ["0 clip.limit=0.1 FINISHED", "1 clip.limit=0.2 KILLED", "1 clip.limit=0.2 FINISHED"]


def test_the_run_of_a_sweep_says_what_came_of_it(tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    ledger = begun(tmp_path)
    for number, speedup in enumerate((4.0, 2.0)):
        fast = reports.measurement(latency=[reports.latency(speedup=speedup, speedup_ci95=(speedup, speedup))])
        with ledger.running(number, [], ledger.folder / str(number)):
            folder = reports.write_run(ledger.folder / str(number), reports.of(fast, "ok"))
        (folder / "config.json").write_text("{}")
        (folder / "model").mkdir()
        (folder / "model" / "manifest.json").write_text('{"files": {"model.onnx": {"sha256": "0"}}}')
    finish_sweep(ledger.folder)  # nothing, since none of its jobs was tracked
    assert runs_at(store) == [] and report_command([str(ledger.folder)]) == 0
    assert push(ledger.folder, "--uri", store) == 0
    (parent,) = [found for found in runs_at(store) if "optpipe.sweep" in found.data.tags]
    assert parent.data.tags["optpipe.best"] == "0" and parent.data.tags["optpipe.status"] == "done"
    shown = {name: parent.data.metrics[name] for name in ("jobs_done", "speedup", "best/size_bytes", "best/quality")}
    assert shown == {"jobs_done": 2, "speedup": 4.0, "best/size_bytes": 25_000, "best/quality": 0.95}
    assert [item.path for item in MlflowClient(store).list_artifacts(parent.info.run_id)] == ["sweep.html"]


def assert_refused(capsys: pytest.CaptureFixture[str], said: str, *words: object) -> None:
    assert push(*words) == 1
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1 and not shown.out


def forget_delivery(folder: Path) -> None:
    """As if the run's tracker had found no server."""
    journal = Journal(folder)
    journal.replace([event for event in journal.read() if event.kind != "delivered"])

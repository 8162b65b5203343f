"""Search: what it draws from, how it goes on, what it makes of failures, and the inverse question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reports

from optpipe import compose
from optpipe.command import Command, read
from optpipe.errors import OverBudget, RecipeError
from optpipe.report import Check, Final, Report
from optpipe.report.__main__ import main as report_on
from optpipe.search import Sampler, Settings, goal, read_weights, weighed
from optpipe.search.objectives import constraints, figures, miss
from optpipe.search.space import Choice, Numbers, Space
from optpipe.search.study import FILE, Search, over
from optpipe.sweep import Ledger, State, folder_for

SPACE = Space(("+recipe=edge_int8",), (Numbers("prune.ratio", 0.1, 0.9), Choice("quantize", ("static", "qat"))))
SMALL = Space((), (Numbers("seed", 0, 2, whole=True), Choice("quantize", ("static", "qat"))))


def outcome(speedup: float, drop: float, allowed: float | None = None) -> Report:
    """A finished run, with a limit on quality perhaps."""
    report = reports.of(reports.measurement(latency=[reports.latency(speedup=speedup)]), "ok")
    assert isinstance(report.final, Final)
    report.final = Final(artifact="model", measurement=report.final.measurement, quality_drop=drop)
    if allowed is not None:
        report.budget.limits = {"quality_drop": allowed}
        report.budget.checks = [check("quality_drop", drop, allowed, drop <= allowed)]
    return report


def check(limit: str, bound: float, allowed: float, holds: bool, where: str = "run") -> Check:
    facts: dict[str, Any] = {"value": bound, "bound": bound, "undecided": False, "said": f"{limit} is {bound}"}
    return Check(where=where, limit=limit, allowed=allowed, holds=holds, **facts)


class Jobs:
    """Runs jobs as a launcher does, in no time: the more is pruned, the faster and the worse; qat loses less."""

    def __init__(self, folder: Path, work: Callable[[dict[str, str]], Report] | None = None) -> None:
        self.folder, self.work, self.launched = folder, work or self.usual, [[]]
        self.launched.clear()

    @staticmethod
    def usual(settings: dict[str, str]) -> Report:
        ratio = float(settings.get("prune.ratio", settings.get("seed", 0)))
        return outcome(1 + 4 * ratio, ratio**3 / (40 if settings["quantize"] == "qat" else 10))

    def __call__(self, jobs: Sequence[Sequence[str]], first: int) -> None:
        for number, job in enumerate(jobs, first):
            self.launched.append(list(job))
            (self.folder / str(number)).mkdir(exist_ok=True)
            with Ledger(self.folder).running(number, job, self.folder / str(number)):
                self.work(dict(word.split("=") for word in job)).write(self.folder / str(number))


def search(folder: Path, jobs: Jobs, space: Space = SPACE, *, prunes: bool = False, **settings: Any) -> Search:
    if not (folder / "sweep.json").exists():
        Ledger(folder).begin(["…"], [])
    return Search(Settings(**settings), space, folder, jobs, prunes=prunes)


@pytest.mark.parametrize("sampler", list(Sampler))
def test_every_sampler_runs_as_many_jobs_as_asked(tmp_path: Path, sampler: Sampler) -> None:
    jobs = Jobs(tmp_path)
    search(tmp_path, jobs, trials=14, sampler=sampler).run()
    assert len(jobs.launched) == 14 and len({tuple(job) for job in jobs.launched}) == 14
    assert all(0.1 <= float(job[1].removeprefix("prune.ratio=")) <= 0.9 for job in jobs.launched)
    assert [job.state for job in Ledger(tmp_path).jobs()] == [State.done] * 14


def test_a_search_that_was_ended_goes_on(tmp_path: Path) -> None:
    def ended(settings: dict[str, str]) -> Report:
        if len(jobs.launched) == 5:
            raise KeyboardInterrupt
        return Jobs.usual(settings)

    jobs, again = Jobs(tmp_path, ended), Jobs(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, jobs, trials=8).run()
    assert (tmp_path / FILE).exists() and len(Ledger(tmp_path).jobs()) == 8
    search(tmp_path, again, trials=8).run()
    assert again.launched[0] == jobs.launched[4]  # the one that did not end, with the same settings
    assert len(again.launched) == 4 and not {tuple(job) for job in again.launched[1:]} & set(map(tuple, jobs.launched))
    search(tmp_path, again, trials=8).run()
    assert len(again.launched) == 4


def test_a_job_that_its_launcher_lost_is_not_given_up(tmp_path: Path) -> None:
    class Lost(Jobs):
        def __call__(self, jobs: Sequence[Sequence[str]], first: int) -> None:
            if first < 2:
                super().__call__(jobs, first)

    jobs, again = Lost(tmp_path), Jobs(tmp_path)
    search(tmp_path, jobs, trials=4).run()
    assert len(jobs.launched) == 2
    search(tmp_path, again, trials=4).run()
    assert len(again.launched) == 2 and [job.state for job in Ledger(tmp_path).jobs()] == [State.done] * 4


def test_a_study_is_shared_by_its_name(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jobs = Jobs(tmp_path / name)
        search(tmp_path / name, jobs, trials=6 if name == "a" else 10, study="mine", storage=uri).run()
        assert len(jobs.launched) == (6 if name == "a" else 4)
    (tmp_path / "c").mkdir()
    with pytest.raises(RecipeError, match=r"the study 'mine' is over: 10 trials, in .*; raise hydra\.sweeper\.trials"):
        search(tmp_path / "c", jobs, trials=10, study="mine", storage=uri).run()
    with pytest.raises(RecipeError, match=r"has 2 objectives; name another with hydra\.sweeper\.study"):
        search(tmp_path / "b", jobs, study="mine", storage=uri, objectives=["size"]).run()
    with pytest.raises(RecipeError, match="the study 'mine' cannot be kept"):
        search(tmp_path / "b", jobs, study="mine", storage="postgresql://127.0.0.1:1/none").run()


def test_a_small_space_is_tried_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = Jobs(tmp_path)
    search(tmp_path, jobs, SMALL, trials=30).run()
    assert len({tuple(job) for job in jobs.launched}) == len(jobs.launched) == 6
    assert "every combination of the space was tried, 6" in capsys.readouterr().err
    assert len(Ledger(tmp_path).jobs()) == 6  # nothing waits any more


def test_failed_and_stopped_jobs_are_told_and_left(tmp_path: Path) -> None:
    def work(settings: dict[str, str]) -> Report:
        if settings["quantize"] == "qat":
            raise ValueError("no data")
        if float(settings["prune.ratio"]) > 0.5:
            report = outcome(2, 0.05)
            report.budget.limits = {"quality_drop": 0.01, "p50_ms": 1.0}
            report.budget.checks = [check("quality_drop", 0.05, 0.01, False, where="distill")]
            report.write(tmp_path / str(len(jobs.launched) - 1))
            raise OverBudget("over budget after step 'distill'")
        return Jobs.usual(settings)

    jobs = Jobs(tmp_path, work)
    loop = search(tmp_path, jobs, trials=12, prunes=True, seed=1)
    loop.run()
    assert all("budget.policy=stop" in job for job in jobs.launched)
    states = {job.state for job in Ledger(tmp_path).jobs()}
    assert states == {State.done, State.failed, State.stopped}
    stopped = next(trial for trial in over(loop._study()) if trial.state.name == "PRUNED")
    assert stopped.constraints == {"quality_drop": pytest.approx(4.0), "p50_ms": 0.0}
    failed = next(trial for trial in over(loop._study()) if trial.state.name == "FAIL")
    assert failed.user_attrs["reason"] == "ValueError: no data"


def test_a_search_with_a_failed_job_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(settings: dict[str, str]) -> Report:
        raise ValueError("no data")

    monkeypatch.chdir(tmp_path)
    folder = folder_for(None, ["…"], [[]] * 3, "it")
    Search(Settings(trials=3), SPACE, folder, Jobs(folder, work)).run()
    assert {job.state for job in Ledger(folder).jobs()} == {State.failed}
    assert folder_for(None, ["…"], [[]] * 3, "it") != folder  # or the same command would do nothing for ever


def test_a_search_for_a_goal_ends_once_it_is_met(tmp_path: Path) -> None:
    def work(settings: dict[str, str]) -> Report:
        ratio = float(settings["prune.ratio"])
        report = outcome(2, 0.0, 0.01)
        report.budget.limits["p50_ms"] = 0.5
        report.budget.checks.append(check("p50_ms", 1 - ratio, 0.5, ratio >= 0.5))
        return report

    jobs = Jobs(tmp_path, work)
    first = [{"prune.ratio": 0.2, "quantize": "static"}, {"prune.ratio": 0.6}]
    search(tmp_path, jobs, trials=9, objectives=["goal"], first=first).run()
    assert [job[1] for job in jobs.launched] == ["prune.ratio=0.2", "prune.ratio=0.6"]
    found = goal.best(Ledger(tmp_path))
    assert found is not None and (found[0].number, found[2]) == (1, True)
    assert goal.said(*found)[0] == "the goal is met by job 1:"


def test_what_a_run_is_judged_by() -> None:
    report = outcome(4.0, 0.02, 0.01)
    names = ["quality", "latency", "size"]
    found = figures(report, names)
    assert found == {"quality": 0.02, "latency": 0.25, "size": pytest.approx(0.25)}
    assert weighed({"quality": 1, "size": 0.1}, {**found}) == pytest.approx(0.045)
    assert constraints(report) == {"quality_drop": pytest.approx(1.0)} and miss(report) == pytest.approx(1.0)
    assert "energy was not measured" in str(figures(report, ["energy"]))
    assert read_weights(["quality=1", "latency=0.05"]) == {"quality": 1, "latency": 0.05}


def test_the_runs_of_a_sweep_are_ranked_by_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, speedup, drop in (("0", 2.0, 0.0), ("1", 10.0, 0.02), ("2", 8.0, 0.0)):
        (tmp_path / name).mkdir()
        outcome(speedup, drop).write(tmp_path / name)
    assert report_on([str(tmp_path), "--weights", "quality=10", "latency=1"]) == 0
    out = capsys.readouterr().out
    assert "by 10·quality + 1·latency, less is better:\n  2: 0.125\n  1: 0.3\n  0: 0.5\n" in out
    assert report_on([str(tmp_path), "--weights", "qality=1"]) == 1
    assert "there is no objective 'qality'; did you mean 'quality'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trials": 0}, "trials is 0; it must be at least 1"),
        ({"objectives": ["latencey"]}, "there is no objective 'latencey'; did you mean 'latency'"),
        ({"objectives": []}, "objectives is empty; name some of quality, latency, size"),
        ({"objectives": ["size", "size"]}, "objectives names 'size' twice"),
        ({"objectives": ["goal", "size"]}, "objectives names 'goal' beside others"),
        ({"weights": {"size": -1}}, "weights.size is -1; it must be at least 0"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def asked(*words: str) -> Command:
    command = read(["--multirun", "+recipe=edge_int8", "hydra/sweeper=search", *words])
    compose.prepare(command)
    return command


def test_the_space_is_written_as_for_any_sweep() -> None:
    words = ("prune.ratio=interval(0.3,0.8)", "distill.epochs=range(2,11,2)", "seed=int(interval(1,4))")
    log = "distill.learning_rate=tag(log,interval(0.001,0.1))"
    command = asked(*words, log, "quantize=static,qat", "budget.quality_drop=0.01", "tracking=none")
    compose.check(command)
    found = compose.search(command)
    assert found is not None and found.prunes
    assert found.space.fixed == ("+recipe=edge_int8", "budget.quality_drop=0.01", "tracking=none")
    assert found.space.dimensions == (
        Numbers("prune.ratio", 0.3, 0.8),
        Numbers("distill.epochs", 2, 10, step=2, whole=True),
        Numbers("seed", 1, 4, whole=True),
        Numbers("distill.learning_rate", 0.001, 0.1, log=True),
        Choice("quantize", ("static", "qat")),
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1"], "nothing is left to choose; give a setting several values"),
        (["seed=1,2", "hydra.sweeper.sampler=tpee"], "hydra.sweeper: Invalid value 'tpee'"),
        (
            ["seed=1,2", "hydra.sweeper.first=[{sed: 1}]"],
            "hydra.sweeper.first: 'sed' is not searched; did you mean 'seed'",
        ),
        (["seed=1,2", "hydra.sweeper.first=[{seed: 3}]"], "hydra.sweeper.first: 'seed' is 3, which is none of 1, 2"),
        (["prune.ratio=interval(0.9,0.3)"], "drawn from 0.9 to 0.3, which holds no number"),
        (["prune.ratio=interval(0.3,1.3)"], "prune: ratio is 1.3"),
        (["seed=1,2", "hydra.sweeper.trails=3"], "trails"),
    ],
)
def test_a_search_that_cannot_run_says_so_before(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=".*" + said.replace("(", r"\(")):
        compose.check(asked(*words))


def test_a_range_holds_its_last_step() -> None:
    command = asked("prune.ratio=range(0.3,0.96,0.05)")
    found = compose.search(command)
    assert found is not None and found.space.dimensions == (Numbers("prune.ratio", 0.3, 0.95, step=0.05),)
    assert found.space.size == 14 and found.space.dimensions[0].distribution()  # Optuna warns where it is uneven


def test_meet_is_a_search_by_itself_and_needs_a_goal() -> None:
    command = read(["+recipe=meet", "goal.p50_ms=5", "quantize=qat"])
    compose.prepare(command)
    compose.check(command)
    found = compose.search(command)
    assert command.is_sweep and found is not None and found.settings.is_for_goal
    assert "quantize" not in {dimension.key for dimension in found.space.dimensions}
    assert command.again(["+recipe=meet"]) == "python -m optpipe +recipe=meet hydra.mode=RUN"
    with pytest.raises(RecipeError, match=r"goal is empty; give at least one limit, for example goal\.p50_ms=5"):
        compose.check(read(["+recipe=meet"]))
    with pytest.raises(RecipeError, match=r"goal is '0\.2'; give at least one limit, for example goal\.p50_ms=5"):
        compose.check(read(["+recipe=meet", "goal=0.2"]))


def test_a_recipe_composes_to_what_the_overrides_do(tmp_path: Path) -> None:
    words = ["+recipe=edge_int8", "prune.ratio=0.4", "quantize=qat", "pipeline=[prune,quantize,trace,export]", "seed=3"]
    command = read(words)
    compose.prepare(command)
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\n" + compose.recipe_of(words, command)
    (tmp_path / "recipe" / "found.yaml").write_text(text)
    (one,), (two,) = (compose.check(c) for c in (command, read(["+recipe=found", "--config-dir", str(tmp_path)])))
    assert {**one.config, "recipe": ""} == {**two.config, "recipe": ""}


def test_a_search_from_the_command_line(optpipe: Any, project: Path) -> None:
    words = (
        "--multirun", "+recipe=clip_int8", "--config-dir", "my_conf", "hydra/sweeper=search",
        "target.instruction_set=neon", "tracking=none", "measure.previews=false", "rehearse=false",
        "pipeline=[clip,trace]", "clip.limit=interval(0.2,1.0)", "hydra.sweeper.trials=3",
        "hydra.sweeper.objectives=[quality,size]",
    )  # fmt: skip
    done = optpipe(*words)
    assert done.code == 0, done.err
    lost = optpipe(*words, "hydra.sweeper.storage=postgresql://127.0.0.1:1/none")
    assert lost.code == 1 and "cannot be kept" in lost.err and "Traceback" not in lost.err + lost.out
    folder = min((project / "outputs" / "sweeps").iterdir())
    assert [job.state for job in Ledger(folder).jobs()] == [State.done] * 3
    assert (folder / FILE).exists() and "[3 of 3 jobs]" in done.err and "3 runs" in done.out

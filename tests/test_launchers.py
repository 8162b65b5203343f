"""Where the jobs of a sweep run: the launchers' presets, what each gives a job, and what they need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_sweep import WORDS, only, states

from optpipe import machine
from optpipe.command import read
from optpipe.compose import CONF, prepare
from optpipe.sweep import State

NEEDS = {"parallel": "hydra_plugins.hydra_joblib_launcher", "slurm": "hydra_plugins.hydra_submitit_launcher"}
PRESETS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_to_a_launcher_that_can_be_made(preset: str) -> None:
    from hydra.core.plugins import Plugins
    from hydra.utils import instantiate

    if preset in NEEDS:
        pytest.importorskip(NEEDS[preset])
    prepare(read(["--multirun"]))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={preset}"], return_hydra_config=True).hydra.launcher
    OmegaConf.set_readonly(config, False)
    assert config._target_ in Plugins.instance().class_name_to_class
    assert instantiate({**config, "submitit_folder": "."} if "submitit_folder" in config else config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_says_what_it_does_and_needs(preset: str) -> None:
    text = (CONF / "hydra" / "launcher" / f"{preset}.yaml").read_text()
    assert text.startswith("# ") and "optpipe[" in text.split("\n_target_")[0].split("\ndefaults")[0]


def test_a_job_keeps_to_the_cores_that_it_was_given() -> None:
    try:
        machine.share_cores(1, 1)
        assert machine.usable_cores() == 1
        machine.share_cores(1, 1000)
        assert machine.usable_cores() == machine.bound_cores()
    finally:
        machine.share_cores(1)


def test_what_a_launcher_needs_is_said_before_anything_runs(optpipe: Any, project: Path) -> None:
    missing = [
        (preset, extra)
        for preset, package, extra in (("parallel", "joblib", "joblib"), ("slurm", "submitit", "slurm"))
        if importlib.util.find_spec(package) is None
    ]
    if not missing:
        pytest.skip("all launchers are installed here")
    for preset, extra in missing:
        done = optpipe(*WORDS, "seed=0,1", f"hydra/launcher={preset}")
        assert done.code == 1 and f'pip install "optpipe[{extra}]"' in done.err
    assert not (project / "outputs" / "sweeps").exists()


def test_no_cluster_is_one_message(optpipe: Any, project: Path) -> None:
    pytest.importorskip("ray")
    done = optpipe(*WORDS, "seed=0,1", "hydra/launcher=ray", "hydra.launcher.address=127.0.0.1:1")
    assert done.code == 1 and "Traceback" not in done.err + done.out
    assert "there is no Ray cluster at hydra.launcher.address=127.0.0.1:1" in done.err
    assert "start one with `ray start --head`" in done.err
    assert states(only(project)) == [State.waiting] * 2


@pytest.mark.slow
def test_a_sweep_on_a_ray_of_its_own(optpipe: Any, project: Path) -> None:
    pytest.importorskip("ray")
    done = optpipe(*WORDS, "clip.limit=0.5,1.0", "model.args.hidden=64,32", "hydra/launcher=ray",
                   "hydra.launcher.address=local")  # fmt: skip
    assert done.code == 1, done.err
    assert states(only(project)) == [State.done, State.failed, State.done, State.failed]
    assert "job 1 failed: RecipeError" in done.err and "4 jobs on a Ray cluster of 1 machine(s)" in done.err


@pytest.mark.slow
def test_a_sweep_on_submitit(optpipe: Any, project: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = ("hydra/launcher=submitit_local", "hydra.launcher.cpus_per_task=1")
    done = optpipe(*WORDS, "clip.limit=0.5,1.0", *given)
    assert done.code == 0, done.err
    assert states(only(project)) == [State.done] * 2

"""Somebody's own model, weights, task and stage, from a folder that optpipe knows nothing of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import my_network
import numpy as np
import pytest
import torch

import optpipe as package


def test_the_outside_recipe_runs_from_its_folder(optpipe: Any, project: Path) -> None:
    (project / "stages").mkdir()  # their own folders of these names shadow nothing
    (project / "stages" / "__init__.py").write_text("raise ImportError('not this one')\n")
    (project / "conf").mkdir()
    done = optpipe(
        "--config-dir",
        "my_conf",
        "+recipe=clip_int8",
        "measure=quick",
        "measure.noise_limit=1000",
        "measure.explain=false",
        "tracking=none",
        "clip.limit=0.2",
        "target.threads=1",
        "target.batch_sizes=[1,2]",
        "budget.size_bytes=10",
    )
    assert done.code == 0, done.err  # the policy is warn
    assert "over budget: size_bytes is" in done.err
    clip = next(stage for stage in done.report["stages"] if stage["key"] == "clip")
    assert clip["stage"] == "clip/weights" and clip["status"] == "ok" and clip["facts"]["clipped"] > 0
    assert "clip/weights" in done.out
    deployed = package.load(done.run)
    assert deployed(np.zeros((2, 64), np.float32)).shape == (2, 10)


def test_a_state_dict_in_a_pt_file_works_too(project: Path) -> None:
    my_network.train(project / "my_weights.pt")
    result = package.optimize(
        recipe="clip_int8",
        overrides=[
            "model.weights=my_weights.pt",
            "target.instruction_set=neon",
            "tracking=none",
            "pipeline=[simplify,trace]",
        ],
        config_dir="my_conf",
        output=project / "run",
    )
    assert result.report.stages[-1].form == "program"


def test_one_call_from_python(project: Path) -> None:
    model, task = my_network.train(project / "w.safetensors"), my_network.pixels()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    overrides = [
        "measure=quick",
        "measure.noise_limit=1000",
        "tracking=none",
        "pipeline=[simplify,quantize,trace,export]",
    ]
    result = package.optimize(model, task, recipe="edge_int8", overrides=overrides)
    assert result.size_reduction > 1 and result.latency.p50_ms > 0
    assert result.report.status == "ok" and (result.folder / "report.json").exists()
    assert result.model(task.example_inputs.numpy()).shape == (4, 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # left as it was


def test_what_optimize_refuses_is_what_the_command_line_refuses(project: Path) -> None:
    with pytest.raises(package.RecipeError, match="did you mean 'ratio'"):
        package.optimize(recipe="edge_int8", overrides=["prune.rato=0.1"])

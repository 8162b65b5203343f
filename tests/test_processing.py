"""Processing of a task's own, inside everything that is made of a model."""

from __future__ import annotations

from pathlib import Path

import my_network
import pytest
import torch
from torch import nn

import optpipe

QUICK = ("target.instruction_set=neon", "tracking=none", "budget.quality_drop=0.2")


class Scale(nn.Module):
    """Bytes (n, 64) -> what the network takes."""

    def forward(self, image):
        return image.float() / 16


def raw_pixels() -> optpipe.Task:
    task = my_network.pixels()
    for split in ("train", "validation", "calibration", "test"):
        batches = [((images * 16).to(torch.uint8), labels) for images, labels in getattr(task, split)]
        setattr(task, split, batches)
    task.example_inputs = (task.example_inputs * 16).to(torch.uint8)
    task.preprocess, task.postprocess = Scale(), nn.LogSoftmax(dim=1)
    return task


def test_the_exported_graph_takes_raw_inputs(project: Path) -> None:
    model = my_network.perceptron()
    model.load_state_dict(__import__("safetensors.torch").torch.load_file("my_weights.safetensors"))
    task = raw_pixels()
    words = [
        *QUICK,
        "distill.epochs=1",
        "distill.student=my_network.perceptron",
        "pipeline=[distill,quantize,trace,export]",
    ]
    result = optpipe.optimize(model, task, overrides=words, output=project / "run")
    images, _ = task.test[0]
    scores = result.model(images.numpy())
    assert result.model.manifest["inputs"][0]["dtype"] == "uint8"
    assert torch.from_numpy(scores).exp().sum(1).allclose(torch.ones(len(images)), atol=1e-2)
    with pytest.raises(optpipe.OptpipeError, match="float32"):
        result.model(images.float().numpy())

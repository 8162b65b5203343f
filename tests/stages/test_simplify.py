from __future__ import annotations

import pytest
import torch
from torch import nn

from optpipe import StageError
from optpipe.stages.simplify import Standard


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def test_batch_norm_dropout_and_identities_go_and_outputs_stay(model, context, task) -> None:
    before = model(task.example_inputs)
    ctx = context(model)
    simplified = Standard().run(model, ctx)
    assert "BatchNorm2d" not in kinds(simplified) and "Dropout" not in kinds(simplified)
    assert ctx.facts["folded_batch_norms"] == 2
    torch.testing.assert_close(simplified(task.example_inputs), before, rtol=1e-4, atol=1e-4)


def test_batch_norm_stays_where_training_follows(model, context) -> None:
    assert "BatchNorm2d" in kinds(Standard(fold_batch_norm=False).run(model, context(model)))


def test_a_norm_whose_input_others_read_is_left_alone(model, context, task) -> None:
    class Shared(nn.Module):
        """The convolution's output goes to the norm and to another module."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, image):
            x = self.conv(image)
            return (self.norm(x) + self.act(x)).mean((2, 3))

    shared = Shared().eval()
    ctx = context(shared)
    before = shared(task.example_inputs)
    torch.testing.assert_close(Standard().run(shared, ctx)(task.example_inputs), before)
    assert ctx.facts["folded_batch_norms"] == 0


def test_an_output_that_changes_is_an_error(context, task) -> None:
    class Peeks(nn.Module):
        """The sum in `forward` reads the convolution's output as well, which no module shows."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.norm.running_mean.fill_(3.0)

        def forward(self, image):
            x = self.conv(image)
            return (self.norm(x) + x).mean((2, 3))

    model = Peeks().eval()
    with pytest.raises(StageError, match="outputs changed by"):
        Standard().run(model, context(model))

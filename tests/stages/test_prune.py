from __future__ import annotations

import pytest
from torch import nn

from optpipe import StageError
from optpipe.stages.prune.channels import Channels


def widths(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("ratio", "round_to", "kept"), [(0.5, 8, 16), (0.7, 16, 16), (0.7, 8, 8), (0.5, 1, 16), (0.9, 16, 16)]
)
def test_channels_shrink_to_the_nearest_multiple(model, context, task, ratio: float, round_to: int, kept: int) -> None:
    pruned = Channels(ratio=ratio, round_to=round_to).run(model, context(model))
    assert set(widths(pruned)) == {kept}
    assert pruned(task.example_inputs).shape == (16, 4)  # the classes are all there


def test_kept_layers_and_all_that_depend_on_them_stay(model, context) -> None:
    ctx = context(model)
    with pytest.raises(StageError, match="removes no channel"):
        Channels(keep=["stem.*", "conv", "shortcut.*"]).run(model, ctx)
    assert set(widths(model)) == {32}


def test_a_pattern_that_matches_nothing_is_an_error_with_examples(model, context) -> None:
    with pytest.raises(StageError, match=r"keep names 'block\*', which matches no module.*stem\.0"):
        Channels(keep=["block*"]).run(model, context(model))


def test_a_model_without_layers_is_an_error(context) -> None:
    with pytest.raises(StageError, match="no convolution or linear layer"):
        Channels().run(nn.Flatten(), context(nn.Flatten()))


def test_two_pruners_of_one_process_share_nothing(model, context) -> None:
    import copy

    first, second = copy.deepcopy(model), copy.deepcopy(model)
    Channels(ratio=0.7).run(first, context(first))
    assert set(widths(Channels(ratio=0.5).run(second, context(second)))) == {16}

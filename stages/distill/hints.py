"""Hints: what layers inside a student and its teacher give, made comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optpipe.errors import StageError
from optpipe.imitation import Imitation
from optpipe.task import Inputs, Task, call, tensors_in

Shapes = dict[str, tuple[int, ...]]


class Watched(nn.Module):
    """A model that also returns what some of its layers gave, as (outputs, [feature, …])."""

    def __init__(self, model: nn.Module, layers: Sequence[str], projections: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.model = model
        self.projections = nn.ModuleList(projections or [nn.Identity() for _ in layers])
        self._layers = list(layers)
        self._seen: dict[str, Tensor] = {}
        self._handles = [
            model.get_submodule(name).register_forward_hook(partial(self._see, name)) for name in self._layers
        ]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Any, list[Tensor]]:
        self._seen.clear()
        outputs = self.model(*args, **kwargs)
        features = [self._seen[name] for name in self._layers]
        return outputs, [projection(feature) for projection, feature in zip(self.projections, features, strict=True)]

    def release(self) -> None:
        """Watch no more: the model is as it was."""
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        self._seen[name] = output


class Projection(nn.Module):
    """A linear map of one dimension of a tensor; of a convolution's channels, a 1×1 convolution."""

    def __init__(self, dimension: int, width: int, wanted: int) -> None:
        super().__init__()
        self.dimension, self.linear = dimension, nn.Linear(width, wanted, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        projected: Tensor = self.linear(feature.movedim(self.dimension, -1)).movedim(-1, self.dimension)
        return projected


@dataclass(eq=False)
class HintedLoss:
    """The loss of imitation, and `weight` times the distance to every hint."""

    imitation: Imitation
    teacher: Watched
    weight: float

    def __call__(self, inputs: Inputs, outputs: Any, target: Any) -> Tensor:
        self.teacher.to(tensors_in(inputs)[0].device)
        with torch.no_grad():
            wanted, hints = call(self.teacher, inputs)
        answers, features = outputs
        distance = torch.stack([_distance(*pair) for pair in zip(features, hints, strict=True)]).sum()
        return self.imitation.loss(answers, wanted, target) + self.weight * distance


def outputs_of_layers(model: nn.Module, task: Task) -> Shapes:
    """The shape of what each layer gives on the example inputs, in the order in which they run."""
    shapes: Shapes = {}

    def see(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1:
            shapes[name] = tuple(output.shape)

    handles = [module.register_forward_hook(partial(see, name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        call(model.eval().to("cpu"), task.example_inputs)
    for handle in handles:
        handle.remove()
    return shapes


def projection(name: str, shape: tuple[int, ...], wanted_name: str, wanted: tuple[int, ...]) -> nn.Module:
    """What maps the student's feature to the shape of its hint. StageError if more than their width differs."""
    differing = [d for d, sizes in enumerate(zip(shape, wanted, strict=False)) if sizes[0] != sizes[1]]
    if len(shape) == len(wanted) and not differing:
        return nn.Identity()
    if len(shape) != len(wanted) or len(differing) > 1 or differing[0] not in (1, len(shape) - 1):
        raise StageError(
            f"hints compares '{name}', which gives {shape}, with the teacher's '{wanted_name}', which gives {wanted}; "
            "only their width may differ: name layers of the same resolution"
        )
    return Projection(differing[0], shape[differing[0]], wanted[differing[0]])


def _distance(feature: Tensor, hint: Tensor) -> Tensor:
    """Squared distance of both, scaled to length 1 per sample, between 0 and 4; mean over the batch."""
    difference = F.normalize(feature.flatten(1)) - F.normalize(hint.flatten(1))
    return difference.square().sum(1).mean()

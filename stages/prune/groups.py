"""Groups: the channels of a model that can only go together, and their removal.

Built on Torch-Pruning's dependency graph (DepGraph, Fang et al. 2023). What that graph gets wrong shows in a forward
pass after the removal; what fails there is put back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from optpipe.errors import StageError, named_reason
from optpipe.task import Inputs, call, tensors_in

from .heads import heads_in
from .loss_gradients import differentiable
from .undo import restore, snapshot, tied_parameters

ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.LSTM, nn.MultiheadAttention)
Importance = Callable[[Any], Tensor | None]  # of a group as Torch-Pruning describes it, of each of its channels


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that run through several layers, and go from all of them or from none."""

    root: nn.Module
    name: str  # of `root`
    channels: int
    parts: int  # equal parts that lose the same positions: of a grouped convolution, or heads
    importance: Tensor  # of each channel, shape (parts, channels / parts)
    heads: tuple[str, ...] = ()  # the linear layers whose output is split into `parts` heads
    refusal: str = ""  # why none of them can be removed; empty where it can be tried

    @property
    def size(self) -> int:
        """Channels of a part."""
        return self.channels // self.parts


@dataclass(frozen=True, eq=False)
class Removal:
    """What is to go from a group: positions in each of its parts, or whole parts."""

    group: Group
    indices: list[int]
    whole_heads: bool = False

    def channels(self) -> list[int]:
        size = self.group.size
        if self.whole_heads:
            return [head * size + i for head in self.indices for i in range(size)]
        return [part * size + i for part in range(self.group.parts) for i in self.indices]


class RefusedError(Exception):
    """A removal would leave something else than a smaller model."""


@dataclass
class Surgeon:
    """Removes channels from `model` in place; what does not survive a forward pass on `inputs` is taken back.

    heads: the linear layers whose output is split into attention heads, and into how many.
    """

    model: nn.Module
    inputs: Inputs
    untouched: list[nn.Module]
    heads: dict[nn.Module, int] = field(init=False)
    _expected: list[torch.Size] = field(init=False)
    _graph: tp.DependencyGraph | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model.eval()
        self._expected = [tensor.shape for tensor in self._outputs()]
        self.heads = heads_in(self.model, self.inputs)
        self._names = {module: name for name, module in self.model.named_modules()}
        self._tied = tied_parameters(self.model)

    def groups(self, importance: Importance) -> list[Group]:
        """Every group of channels that holds no layer of `untouched`."""
        graph = self._dependencies()
        found: list[Group | None] = []
        untouched = {part for layer in self.untouched for part in layer.modules()}
        seen = set(untouched)
        for root in list(graph.module2node):
            if not isinstance(root, ROOTS) or root in seen:
                continue
            channels = list(range(graph.get_out_channels(root)))
            try:
                members = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, channels)
                layers = [d.target.module for d, _ in members if graph.is_out_channel_pruning_fn(d.handler)]
                if untouched.isdisjoint(layers):
                    found.append(self._group(members, layers, importance))
                seen.update(layers)
            except Exception as error:  # of Torch-Pruning, which does not know every operator
                found.append(self._refused(root, f"Torch-Pruning cannot follow its channels ({named_reason(error)})"))
        return [group for group in found if group is not None]

    def remove(self, removals: list[Removal]) -> dict[str, str]:
        """Remove what can be; return by the group's name why the others stay."""
        with differentiable(self.model):
            if not any(removal.whole_heads for removal in removals) and self._attempt(removals) is None:
                return {}
            reasons = {removal.group.name: self._attempt([removal]) for removal in removals}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _attempt(self, removals: list[Removal]) -> str | None:
        """Remove all of them, or none; return the reason in the second case."""
        before, heads = snapshot(self.model), dict(self.heads)
        try:
            for removal in removals:
                self._cut(removal)
            self._check()
        except Exception as error:  # of Torch-Pruning, or of the user's own forward
            restore(before)
            self._graph, self.heads = None, heads
            return (
                str(error)
                if isinstance(error, RefusedError)
                else f"without some of its channels, {named_reason(error)}"
            )
        return None

    def _cut(self, removal: Removal) -> None:
        graph, root = self._dependencies(), removal.group.root
        members = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, removal.channels())
        if not graph.check_pruning_group(members):
            raise RefusedError("no channel would be left")
        expected = self._without(graph, members) if removal.whole_heads else None
        with torch.no_grad():
            members.prune()
        if expected is None:
            return
        self._count_heads(removal)
        for wanted, found in zip(expected, self._outputs(), strict=True):
            scale = float(wanted.abs().max())
            if wanted.shape != found.shape or not torch.allclose(wanted, found, atol=1e-4 * scale, rtol=1e-3):
                raise RefusedError("without these heads the model does not compute what it did with them at nought")

    def _without(self, graph: tp.DependencyGraph, members: Any) -> list[Tensor]:
        """The outputs with nothing read from the channels of `members`."""
        before = snapshot(self.model)
        for dependency, indices in members:
            layer = dependency.target.module
            if isinstance(layer, nn.Linear) and graph.is_in_channel_pruning_fn(dependency.handler):
                weight = layer.weight.detach().clone()
                weight[:, indices] = 0
                layer.weight = nn.Parameter(weight)
        outputs = self._outputs()
        restore(before)
        return outputs

    def _count_heads(self, removal: Removal) -> None:
        """Lower the number of heads that the modules around the split layers keep."""
        owners = {self.model.get_submodule(name.rpartition(".")[0]) for name in removal.group.heads}
        for owner in owners:
            numbers = [
                name for name, value in vars(owner).items() if type(value) is int and value == removal.group.parts
            ]
            names = [name for name in numbers if "head" in name] or numbers
            if len(names) != 1:
                raise RefusedError(
                    f"'{self._names[owner]}' ({type(owner).__name__}) has no single attribute that holds its number of "
                    f"heads, {removal.group.parts}, and could be lowered"
                )
            setattr(owner, names[0], removal.group.parts - len(removal.indices))
        for name in removal.group.heads:
            self.heads[self.model.get_submodule(name)] -= len(removal.indices)

    def _check(self) -> None:
        self._tie_again()
        outputs = self._outputs()
        shapes = [tensor.shape for tensor in outputs]
        if shapes != self._expected:
            raise RefusedError(f"the outputs would have shapes {_plain(shapes)} instead of {_plain(self._expected)}")
        if not all(torch.isfinite(tensor).all() for tensor in outputs):
            raise RefusedError("the outputs would be NaN or infinite")
        if self.heads and (found := heads_in(self.model, self.inputs)) != self.heads:
            layer = next(layer for layer, heads in self.heads.items() if found.get(layer) != heads)
            raise RefusedError(
                f"the output of '{self._names[layer]}' would be cut into {found.get(layer, 'no')} heads instead of "
                f"{self.heads[layer]}, because their width is fixed; heads=true removes whole ones"
            )

    def _tie_again(self) -> None:
        """Torch-Pruning makes new parameters, one for each layer that shared one."""
        for places in self._tied:
            first, *others = [getattr(self.model.get_submodule(layer), name) for layer, name in places]
            if any(other.shape != first.shape or not torch.equal(other, first) for other in others):
                names = " and ".join(f"'{layer}'" for layer, _ in places)
                raise RefusedError(f"{names} share their weights, which would come apart")
            for layer, name in places:
                setattr(self.model.get_submodule(layer), name, first)

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return tensors_in(call(self.model, self.inputs))

    def _dependencies(self) -> tp.DependencyGraph:
        if self._graph is None:
            try:
                with differentiable(self.model), torch.enable_grad():
                    self._graph = tp.DependencyGraph().build_dependency(
                        self.model, example_inputs=self.inputs, forward_fn=call, verbose=False
                    )
            except Exception as error:
                raise StageError(
                    "how the layers of this model depend on one another cannot be traced "
                    f"({named_reason(error)}); its outputs must depend on its weights differentiably"
                ) from error
        return self._graph

    def _group(self, members: Any, layers: list[nn.Module], importance: Importance) -> Group | None:
        root = members[0].dep.target.module
        recurrent = next((d.target.module for d, _ in members if isinstance(d.target.module, nn.RNNBase)), None)
        if recurrent is not None:
            kind = type(recurrent).__name__
            said = f"its channels run through '{self._names[recurrent]}' ({kind}), whose gates Torch-Pruning cannot cut"
            return self._refused(root, said)
        ranks = importance(members)
        if ranks is None:  # it has no weights to be ranked by
            return None
        divided = [_parts(self._dependencies(), dependency) for dependency, _ in members]
        parts = math.lcm(*divided, *(self.heads.get(layer, 1) for layer in layers))
        if len(ranks) % parts:
            return self._refused(root, f"{len(ranks)} channels cannot lose the same ones in each of {parts} parts")
        return Group(
            root=root,
            name=self._names[root],
            channels=len(ranks),
            parts=parts,
            importance=ranks.view(parts, -1).nan_to_num(0.0),  # a group of noughts is divided by its mean
            heads=tuple(self._names[layer] for layer in layers if self.heads.get(layer) == parts),
        )

    def _refused(self, root: nn.Module, reason: str) -> Group:
        nothing = torch.zeros(1, 0)
        return Group(root=root, name=self._names[root], channels=0, parts=1, importance=nothing, refusal=reason)


def _parts(graph: tp.DependencyGraph, dependency: Any) -> int:
    """Into how many equal parts a layer divides the channels that it gives, or takes."""
    layer = dependency.target.module
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.num_heads)
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels:
        return 1  # depthwise: every channel is one of its own
    pruner = graph.get_pruner_of_module(layer)
    outward = graph.is_out_channel_pruning_fn(dependency.handler)
    return int(pruner.get_out_channel_groups(layer) if outward else pruner.get_in_channel_groups(layer))


def _plain(shapes: list[torch.Size]) -> list[tuple[int, ...]]:
    return [tuple(shape) for shape in shapes]

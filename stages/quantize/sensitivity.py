"""Sensitivity: what quantising each layer costs, found on a calibrated graph by rounding one layer at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from optpipe.context import Context
from optpipe.predictions import Predictions
from optpipe.report.schema import Table
from optpipe.task import call, tensors_in

from .placement import held, layer_of

if TYPE_CHECKING:
    from .engines import Annotator

OUTLIER = 6.0  # standard deviations from the mean
ALONE, ACCUMULATED = "SQNR alone, dB", "SQNR accumulated, dB"
NOTHING = 1e-30  # powers below are none


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What quantising one layer costs. Ratios of powers are in dB, signal to quantisation noise."""

    layer: str
    sqnr_db: float  # of its output, when it alone is quantised
    output_sqnr_db: float  # of the model's output then
    quality_drop: float | None  # of the model on validation then; None where that was not asked for
    accumulated_sqnr_db: float  # of its output when the whole model is quantised: the error's growth
    outlier_share: float  # of its input's values that lie beyond OUTLIER standard deviations
    input_noise: float  # mean squared rounding error of its input, of a table: of its rows
    expected_noise: float  # Δ²/12, that of a uniform error within one step Δ (Widrow 1956)


class Rounding(nn.Module):
    """Rounds a tensor as its calibrated observer would, while it is on."""

    def __init__(self, observer: Any) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        self.scale, self.zero_point = scale.flatten().float(), zero_point.flatten().to(torch.int32)
        self.low, self.high = int(observer.quant_min), int(observer.quant_max)
        self.axis = int(observer.ch_axis) if self.scale.numel() > 1 else None
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(x) if self.on else x

    def rounded(self, x: Tensor) -> Tensor:
        if self.axis is not None:
            return torch.fake_quantize_per_channel_affine(
                x, self.scale, self.zero_point, self.axis, self.low, self.high
            )
        return torch.fake_quantize_per_tensor_affine(x, float(self.scale), int(self.zero_point), self.low, self.high)


class Sensitivity:
    """A calibrated graph whose layers can be rounded one by one.

    prepared: changed; what it is converted from must be a copy.
    """

    def __init__(self, prepared: GraphModule, quantizer: Annotator, ctx: Context) -> None:
        self.ctx, self.graph = ctx, prepared
        self.roundings: dict[str, list[Rounding]] = defaultdict(list)
        self.nodes: dict[str, Node] = {}  # the last operator of each layer
        self._inputs: dict[str, tuple[Node, Rounding]] = {}
        names = {node.name for node in (*quantizer.integer_nodes, *quantizer.table_nodes)}
        for node in list(prepared.graph.nodes):
            if node.name in names:
                self._give_own_roundings(node)
        for node in list(prepared.graph.nodes):
            if _is_observer(prepared, node):
                self._leave_to_producer(node)
        prepared.recompile()
        self.float = self._predict([])

    @property
    def layers(self) -> list[str]:
        return list(self.nodes)

    def drop(self, kept: Iterable[str]) -> float:
        """The quality lost on validation when all layers but `kept` are rounded."""
        kept = set(kept)
        return self._predict(layer for layer in self.layers if layer not in kept).drop_from(self.float)

    @torch.no_grad()
    def analyse(self, *, judged: bool) -> list[LayerSensitivity]:
        """What each layer costs, in the order that they run; noise is measured on the first calibration batch.

        judged: whether the model is evaluated on validation for each layer.
        """
        batch, _ = next(iter(self.ctx.task.calibration))
        exact, exact_output = self._look(batch, [])
        everything, _ = self._look(batch, self.layers)
        found = []
        for layer in self.ctx.progress(self.layers, "sensitivity of each layer"):
            alone, output = self._look(batch, [layer])
            source, rounding = self._inputs[layer]
            values = exact[source.name]
            node = self.nodes[layer].name
            found.append(
                LayerSensitivity(
                    layer=layer,
                    sqnr_db=sqnr_db(exact[node], alone[node]),
                    output_sqnr_db=sqnr_db(exact_output, output),
                    quality_drop=self._predict([layer]).drop_from(self.float) if judged else None,
                    accumulated_sqnr_db=sqnr_db(exact[node], everything[node]),
                    outlier_share=float(((values - values.mean()).abs() > OUTLIER * values.std()).float().mean()),
                    input_noise=float((rounding.rounded(values) - values).square().mean()),
                    expected_noise=float(rounding.scale.square().mean() / 12),
                )
            )
        self._switch([])
        return found

    def _give_own_roundings(self, node: Node) -> None:
        """Let `node` alone read its rounded inputs and weights: other layers may read the same tensor unrounded."""
        layer = layer_of(node)
        self.nodes[layer] = node
        read: list[tuple[Node, Rounding]] = []
        observed = [source for source in node.all_input_nodes if _is_observer(self.graph, source)]
        for number, source in enumerate(observed):
            observer = held(self.graph, source)
            tensor: Any = source.args[0]
            if not hasattr(observer, "quant_min") or observer.dtype == torch.int32:  # a bias: its steps are tiny
                node.replace_input_with(source, tensor)
                continue
            name = f"rounding_{node.name}_{number}"
            self.graph.add_submodule(name, Rounding(observer))
            self.roundings[layer].append(rounding := attrgetter(name)(self.graph))
            with self.graph.graph.inserting_before(node):
                node.replace_input_with(source, self.graph.graph.call_module(name, (tensor,)))
            read.append((tensor, rounding))
        if layer not in self._inputs and read:  # the activation, or the rows of a table
            self._inputs[layer] = next((pair for pair in read if pair[0].op != "get_attr"), read[0])

    def _leave_to_producer(self, node: Node) -> None:
        """An observer that no integer operator reads rounds the output of the layer before it."""
        observer = held(self.graph, node)
        source: Any = node.args[0]
        layer = layer_of(source)
        if layer in self.nodes and node.users and hasattr(observer, "quant_min") and source.op != "get_attr":
            setattr(self.graph, str(node.target), Rounding(observer))
            self.roundings[layer].append(held(self.graph, node))
            return
        node.replace_all_uses_with(source)
        self.graph.graph.erase_node(node)

    def _switch(self, layers: Iterable[str]) -> None:
        on = set(layers)
        for layer, roundings in self.roundings.items():
            for rounding in roundings:
                rounding.on = layer in on

    def _predict(self, layers: Iterable[str]) -> Predictions:
        self._switch(layers)
        return self.ctx.task.predict(lambda *args, **kwargs: self.graph(*args, **kwargs), "validation")

    def _look(self, batch: Any, layers: Iterable[str]) -> tuple[dict[str, Tensor], Tensor]:
        """What the layers and their inputs are on `batch`, by the node's name, and the model's first output."""
        self._switch(layers)
        wanted = {node.name for node in self.nodes.values()} | {source.name for source, _ in self._inputs.values()}
        seen: dict[str, Tensor] = {}

        class Look(Interpreter):
            def run_node(self, node: Node) -> Any:
                value = super().run_node(node)
                if node.name in wanted:
                    seen[node.name] = value
                return value

        outputs = call(_as_called(Look(self.graph)), batch)
        return seen, tensors_in(outputs)[0]


def table(found: list[LayerSensitivity], unit: str) -> Table:
    """The report's table of a sensitivity analysis; `unit` is that of the task's metric."""
    scale, of = (100.0, ", points") if unit == "fraction" else (1.0, "")
    drops = [entry.quality_drop for entry in found]
    judged = (
        {f"quality lost alone{of}": [scale * drop for drop in drops if drop is not None]} if None not in drops else {}
    )
    columns: dict[str, list[Any]] = {
        "layer": [entry.layer for entry in found],
        ALONE: [entry.sqnr_db for entry in found],
        ACCUMULATED: [entry.accumulated_sqnr_db for entry in found],
        "SQNR of the model's output, dB": [entry.output_sqnr_db for entry in found],
        **judged,
        "outliers, %": [100 * entry.outlier_share for entry in found],
        "noise of the input": [entry.input_noise for entry in found],
        "Δ²/12": [entry.expected_noise for entry in found],
    }
    return Table(
        title="Sensitivity to quantisation",
        columns=list(columns),
        rows=[list(row) for row in zip(*columns.values(), strict=True)],
        chart=[[ALONE, ACCUMULATED], *judged],
        note="Each layer's inputs and weights rounded alone, the others exact; accumulated: all rounded; the input of "
        "an embedding is its rows. Outliers are "
        f"further than {OUTLIER:g} standard deviations from the mean. Noise far above Δ²/12 is clipping, far below it "
        "are values that lie on the grid, such as zeros behind a relu.",
    )


def sqnr_db(exact: Tensor, rounded: Tensor) -> float:
    """Signal power over the power of the difference, in dB; 300 where there is none."""
    signal, noise = float(exact.square().sum()), float((rounded - exact).square().sum())
    return 10 * math.log10(max(signal, NOTHING) / max(noise, NOTHING * max(signal, 1.0)))


def _is_observer(graph: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and hasattr(held(graph, node), "calculate_qparams")


def _as_called(interpreter: Interpreter) -> Any:
    """`interpreter` with the graph's own calling convention."""
    graph: Any = interpreter.module
    codegen = graph.graph._codegen
    return lambda *args, **kwargs: interpreter.run(*codegen.process_inputs(*args, **kwargs), enable_io_processing=False)

"""Quantizers of other engines, as this family uses its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from .placement import PRODUCTS, WEIGHTED, kind_of, layer_of
from .scheme import Scheme

COMPUTE = WEIGHTED | PRODUCTS


class Borrowed(Quantizer):  # type: ignore[misc]
    """The quantizer of an engine that replaces whole patterns, which it alone knows.

    Attributes are those of `IntegerQuantizer`, read from the annotations that it made.
    """

    def __init__(self, engine: str, own: Quantizer, scheme: Scheme, keep: Iterable[str]) -> None:
        self.engine, self.own, self.scheme, self.keep = engine, own, scheme, set(keep)
        self.integer_nodes: dict[Node, None] = {}
        self.table_nodes: dict[Node, None] = {}
        self.left_in_float: dict[str, str] = {}

    @property
    def compute_layers(self) -> list[str]:
        return [layer_of(node) for node in self.integer_nodes if node.target in COMPUTE]

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        transformed: GraphModule = self.own.transform_for_annotation(model)
        return transformed

    def annotate(self, model: GraphModule) -> GraphModule:
        kept = [node for node in model.graph.nodes if node.op == "call_function" and layer_of(node) in self.keep]
        for node in kept:  # a quantizer passes over what is annotated
            node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(_annotated=True)
        self.own.annotate(model)
        for node in kept:
            del node.meta[Q_ANNOTATION_KEY]
        for node in model.graph.nodes:
            annotation = node.meta.get(Q_ANNOTATION_KEY)
            if annotation is not None and annotation.input_qspec_map:
                self.integer_nodes[node] = None
            elif node.target in COMPUTE and layer_of(node) not in self.keep:
                self.left_in_float[f"'{layer_of(node)}' ({kind_of(node)})"] = f"{self.engine} has no int8 for it"
        return model

    def validate(self, model: GraphModule) -> None:
        self.own.validate(model)

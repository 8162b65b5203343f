"""Quantizers of other engines, as this family uses its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from optpipe.errors import StageError, named_reason

from .placement import FLOAT_ONLY, PRODUCTS, WEIGHTED, kind_of, layer_of, name_layers
from .scheme import Scheme

STACK = "nn_module_stack"  # in a node's meta data: the modules that it is called in, the innermost last


class Borrowed(Quantizer):  # type: ignore[misc]
    """The quantizer of an engine that replaces whole patterns, which it alone knows.

    Attributes are those of `IntegerQuantizer`, read from the annotations that it made.
    whose: for messages, "torchao's quantiser for Inductor".
    annotation: the kind of annotation that it makes.
    """

    def __init__(self, whose: str, own: Quantizer, annotation: Any, scheme: Scheme, keep: Iterable[str]) -> None:
        self.whose, self.own, self.annotation, self.scheme, self.keep = whose, own, annotation, scheme, set(keep)
        self.integer_nodes: dict[Node, None] = {}
        self.table_nodes: dict[Node, None] = {}
        self.left_in_float: dict[str, str] = {}

    @property
    def compute_layers(self) -> list[str]:
        return [layer_of(node) for node in self.integer_nodes if node.target in WEIGHTED | PRODUCTS]

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        name_layers(model)
        transformed: GraphModule = self.own.transform_for_annotation(model)
        return transformed

    def annotate(self, model: GraphModule) -> GraphModule:
        """Raises StageError if the engine's quantizer fails, as it does on patterns that it half knows."""
        kept = [node for node in model.graph.nodes if node.op == "call_function" and layer_of(node) in self.keep]
        for node in kept:  # a quantizer passes over what is annotated
            node.meta[Q_ANNOTATION_KEY] = self.annotation(_annotated=True)
        try:
            with _calls_told_apart(model), warnings.catch_warnings(action="ignore"):  # of what it passes over
                self.own.annotate(model)
        except Exception as error:  # of the engine's quantizer
            raise StageError(
                f"{self.whose} cannot place this model ({named_reason(error)}); use quantize.placement=onnxruntime or "
                "openvino"
            ) from error
        for node in kept:
            del node.meta[Q_ANNOTATION_KEY]
        for node in model.graph.nodes:
            annotation = node.meta.get(Q_ANNOTATION_KEY)
            if annotation is not None and annotation.input_qspec_map:
                self.integer_nodes[node] = None
            elif node.target in {*WEIGHTED, *PRODUCTS, *FLOAT_ONLY} and layer_of(node) not in self.keep:
                self.left_in_float[f"'{layer_of(node)}' ({kind_of(node)})"] = f"{self.whose} passes over it"
        return model

    def validate(self, model: GraphModule) -> None:
        self.own.validate(model)


@contextmanager
def _calls_told_apart(model: GraphModule) -> Iterator[None]:
    """Within this every call of a module has a name of its own.

    torchao takes the operators of all calls of one module for one pattern, and fails on a ReLU that a block uses twice.
    """
    stacks = {node: node.meta[STACK] for node in model.graph.nodes if node.meta.get(STACK)}
    for node, stack in stacks.items():
        call, (_, kind) = list(stack.items())[-1]  # "L__self___relu@1" is the second call of "relu"
        node.meta[STACK] = {**stack, call: (call, kind)}
    try:
        yield
    finally:
        for node, stack in stacks.items():
            node.meta[STACK] = stack

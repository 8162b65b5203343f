"""Fusions: what is left to the runtime, and what stands in its way."""

from __future__ import annotations

from torch import nn

from .flow import Flow
from .folding import CONVOLUTIONS, LAYERS, TRANSPOSED, spoken
from .trials import Opportunity

# Activations that ONNX Runtime 1.31 (CPU, all its graph optimisations) computes within a convolution, or a linear
# layer on (n, features), found by exporting each with torch and reading the graph that it runs.
IN_CONVOLUTION = {"relu", "relu6", "hardtanh", "clamp", "tanh", "sigmoid", "leakyrelu", "hardsigmoid"}
IN_LINEAR = {"relu", "tanh", "sigmoid", "leakyrelu", "hardsigmoid", "elu", "selu"}
ACTIVATIONS = IN_CONVOLUTION | IN_LINEAR | {"gelu", "silu", "hardswish", "softplus", "prelu", "mish", "celu"}
TAKEN = "ONNX Runtime computes both at once where it loads the exported file; of other runtimes this was not checked"


def activations(model: nn.Module, flow: Flow, with_norm: dict[str, str]) -> list[Opportunity]:
    """Layers with the activation that reads them. with_norm: layer → the batch norm that was folded into it."""
    modules = dict(model.named_modules())
    found = []
    for name, layer in modules.items():
        for reader in flow.readers(name) if type(layer) in LAYERS else ():
            kind = _activation(reader, modules)
            if kind is None:
                continue
            folded = [with_norm[name]] if name in with_norm else []
            parts = [spoken(layer), *(["BatchNorm"] if folded else []), kind[1]]
            reason = _why_not(layer, kind[0], flow, name, reader)
            status = "refused" if reason else "left to the runtime"
            found.append(Opportunity("+".join(parts), (name, *folded, reader), status, reason or TAKEN))
    return found


def unread(model: nn.Module, flow: Flow) -> list[Opportunity]:
    """Layers with weights whose output nothing reads: the last ones of branches that only dropped outputs needed."""
    return [
        Opportunity(
            "Unread branch", (name,), "left to the runtime", "no output needs it; a captured graph leaves it out"
        )
        for name, module in model.named_modules()
        if flow.calls(name) and type(module) in LAYERS and not flow.readers(name)
    ]


def _activation(reader: str, modules: dict[str, nn.Module]) -> tuple[str, str] | None:
    """(its kind, as it is spoken of) if `reader` is an activation."""
    spoken_of = reader.removesuffix("()") if reader not in modules else type(modules[reader]).__name__
    kind = spoken_of.lower().replace("_", "")
    return (kind, {"relu": "ReLU", "gelu": "GELU"}.get(kind, spoken_of)) if kind in ACTIVATIONS else None


def _why_not(layer: nn.Module, kind: str, flow: Flow, name: str, reader: str) -> str:
    others = [other for other in flow.readers(name) if other != reader]
    if others:
        return f"what '{name}' gives is read by {', '.join(others)} too, before the activation"
    if not flow.runs_once(name):
        return f"'{name}' runs {flow.calls(name)} times"
    if type(layer) in TRANSPOSED:
        return "ONNX Runtime has no transposed convolution with an activation"
    if type(layer) in CONVOLUTIONS:
        return "" if kind in IN_CONVOLUTION else f"ONNX Runtime has no convolution with {kind} in it"
    if flow.ranks(name) != {2}:
        return "ONNX Runtime has no matrix product with an activation for inputs of more than 2 dimensions"
    return "" if kind in IN_LINEAR else f"ONNX Runtime has no matrix product with {kind} in it"

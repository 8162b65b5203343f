"""Where two forms of one model part: the first layer whose output is no longer the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from optpipe.forms import ExportedFile
from optpipe.progress import log
from optpipe.task import Inputs, arguments


def first_divergence(program: ExportedProgram, exported: ExportedFile, inputs: Inputs, tolerance: float) -> str:
    """The layer of `program` whose output first differs in the ONNX file made of it; empty where it cannot be told.

    Values are compared that have one name in both, as torch's exporter gives them, in the order that they are computed
    in; ONNX Runtime computes them without rewriting the graph. tolerance: as a share of the largest value.
    """
    try:
        return _first(program, exported, inputs, tolerance)
    except Exception:  # of what opens or runs the file; that it differs is known without the place
        log.exception("where %s differs could not be found out", exported.path)
        return ""


def _first(program: ExportedProgram, exported: ExportedFile, inputs: Inputs, tolerance: float) -> str:
    ours = _Recorder(program.module())
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        ours.run(*args, *kwargs.values())
    theirs = _values(exported, {name: value.numpy() for name, value in ours.values.items()}, [*args, *kwargs.values()])
    for name, value in ours.values.items():
        if name in theirs and theirs[name].shape == tuple(value.shape):
            scale = value.abs().max().clamp(min=1e-6)
            if not float((torch.from_numpy(theirs[name]) - value).abs().max() / scale) <= tolerance:
                return ours.layers[name]
    return ""


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every floating-point tensor in it, by the node's name."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.values: dict[str, torch.Tensor] = {}
        self.layers: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
            self.values[n.name] = value.detach().clone()
            stack = list(n.meta.get("nn_module_stack", {}).values())
            self.layers[n.name] = stack[-1][0].partition("@")[0] if stack else n.name
        return value


def _values(exported: ExportedFile, wanted: dict[str, Any], inputs: list[torch.Tensor]) -> dict[str, Any]:
    """What the file computes under the names that are wanted."""
    import onnx
    import onnxruntime as ort

    proto = onnx.load(exported.path)
    known = {output.name for output in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name in wanted]
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return dict(zip(names, session.run(names, feeds), strict=True)) if names else {}

"""What ONNX Runtime makes of a quantised module, and how far its outputs are off."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import nn

from optpipe import lower
from optpipe.forms import ExportedFile, form
from optpipe.runtimes.onnxruntime import session_options
from optpipe.task import Task, call

FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def export(model: nn.Module, task: Task, folder: Path) -> ExportedFile:
    return lower.to_onnx(lower.trace(model, task), folder / "model.onnx")


def operators(model: nn.Module, task: Task, folder: Path) -> Counter:
    """What ONNX Runtime really runs."""
    exported = export(model, task, folder)
    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def error(found: nn.Module, expected: nn.Module, task: Task) -> float:
    """The largest difference of an output, as a share of the largest output."""
    with torch.no_grad():
        wanted, got = call(expected, task.example_inputs), call(found, task.example_inputs)
    return float((wanted - got).abs().max() / wanted.abs().max())


def export_error(model: nn.Module, task: Task, folder: Path) -> float:
    """The same of an exported model, in its runtime, to the model itself."""
    return error(form("onnx").as_callable(export(model, task, folder)), model, task)

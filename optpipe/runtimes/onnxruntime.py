"""ONNX Runtime, CPU execution provider."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from optpipe.forms import ExportedFile
from optpipe.runtimes import Runner

NAME = "onnxruntime"


def runner(model: ExportedFile, threads: int) -> Runner:
    session = ort.InferenceSession(str(model.path), session_options(threads), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        outputs: list[Any] = session.run(None, {**dict(zip(names, args, strict=False)), **kwargs})
        return outputs

    return run


def session_options(threads: int) -> ort.SessionOptions:
    """One operator at a time on `threads` threads; ONNX Runtime's own graph optimisations all on (its default)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options

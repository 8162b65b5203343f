"""OpenVINO, on a processor.

Where float stays float: a processor with 16-bit instructions would compute it in bfloat16 unless told otherwise.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino as ov

from optpipe.forms import ExportedFile
from optpipe.runtimes import Runner
from optpipe.runtimes.options import OpenVino

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.task import Task

NAME = "openvino"


def runner(model: ExportedFile, threads: int, device: str = "cpu", options: OpenVino | None = None) -> Runner:
    options = options or OpenVino()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": options.precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": options.streams,
    }
    compiled = ov.Core().compile_model(model.path, "CPU", settings)
    names = [port.any_name for port in compiled.inputs]
    own = threading.local()  # a request answers one call at a time

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer({**dict(zip(names, args, strict=False)), **kwargs}, share_inputs=True)
        return list(found.values())

    return run


def lower(program: ExportedProgram, folder: Path, task: Task, rewrite: bool = True) -> ExportedFile:
    """An ONNX file, which OpenVINO reads; converting it would change nothing that it computes."""
    from optpipe.runtimes.onnxruntime import lower

    return lower(program, folder, task, rewrite)


def to_ir(model: ExportedFile, folder: Path, half: bool = False) -> ExportedFile:
    """Convert an ONNX file to OpenVINO's own format. half: store the weights that stay float in 16 bits.

    Raises StageError with OpenVINO's reason if it cannot take the file.
    """
    from optpipe.errors import StageError, named_reason
    from optpipe.forms.exported import EXPORTED

    path = folder / EXPORTED["openvino"].FILE
    try:
        ov.save_model(ov.convert_model(str(model.path)), path, compress_to_fp16=half)
    except Exception as error:  # OpenVINO's errors share no base class
        raise StageError(f"OpenVINO cannot convert this file: {named_reason(error)}") from error
    return ExportedFile(path, "openvino")

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
Shapes = tuple[tuple[int, ...], ...]


def runner(model: ExportedFile, threads: int, device: str = "cpu", options: OpenVino | None = None) -> Runner:
    options = options or OpenVino()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": options.precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": options.streams,
    }
    compiled = _Compiled(model, settings, options.shapes)
    names = [port.any_name for port in compiled.model.inputs]
    own = threading.local()  # a request answers one call at a time

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        inputs = dict(zip(names, args, strict=False), **kwargs)
        shapes = tuple(array.shape for array in inputs.values())
        requests = own.__dict__.setdefault("requests", {})
        request = requests.get(shapes)
        if request is None:
            key, fitting = compiled.for_inputs(shapes, inputs)
            if key not in requests:
                requests[key] = fitting.create_infer_request()
            request = requests[key]
        return list(request.infer(inputs, share_inputs=True).values())

    return run


class _Compiled:
    """One model, compiled for each of the first `most` shapes that it is called with, and once for all others."""

    def __init__(self, model: ExportedFile, settings: dict[str, Any], most: int) -> None:
        self._core, self._settings, self._most = ov.Core(), settings, most
        self.model = self._core.read_model(model.path)
        self._fixed: dict[Shapes, ov.CompiledModel] = {}
        self._free = None if most and self.model.is_dynamic() else self._compile(self.model)
        self._lock = threading.Lock()

    def for_inputs(self, shapes: Shapes, inputs: dict[str, Any]) -> tuple[Shapes | None, ov.CompiledModel]:
        """What runs `inputs`, and the shapes that it is compiled for; None for all."""
        with self._lock:
            if self._free is None and shapes not in self._fixed and len(self._fixed) < self._most:
                fixed = self.model.clone()
                fixed.reshape({name: array.shape for name, array in inputs.items()})
                self._fixed[shapes] = self._compile(fixed)
            if shapes in self._fixed:
                return shapes, self._fixed[shapes]
            self._free = self._free or self._compile(self.model)
            return None, self._free

    def _compile(self, model: ov.Model) -> ov.CompiledModel:
        return self._core.compile_model(model, "CPU", self._settings)


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

"""ONNX Runtime: its CPU execution provider, or CUDA's and TensorRT's on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from optpipe.errors import OptpipeError
from optpipe.forms import ExportedFile
from optpipe.runtimes import Runner
from optpipe.runtimes.options import OnnxRuntime

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.task import Task

NAME = "onnxruntime"
GRAPH_LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
DEFAULTS = OnnxRuntime()


def runner(model: ExportedFile, threads: int, device: str = "cpu", options: OnnxRuntime = DEFAULTS) -> Runner:
    names = options.providers or [*(["CUDAExecutionProvider"] if device != "cpu" else []), "CPUExecutionProvider"]
    settings = [dict(options.provider_options.get(name, {})) for name in names]
    for name, setting in zip(names, settings, strict=True):
        if name == "CUDAExecutionProvider" and ":" in device:
            setting.setdefault("device_id", device.partition(":")[2])
    session = ort.InferenceSession(
        str(model.path), session_options(threads, options), providers=names, provider_options=settings
    )
    session.disable_fallback()
    if absent := [name for name in names if name not in session.get_providers()]:  # it would only have warned
        raise OptpipeError(f"ONNX Runtime could not start {', '.join(absent)} here; its log says why")
    inputs = [node.name for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]
    # InferenceSession.run looks at names and values once more, a sixth of a small network's time; where a version of
    # it has nothing inside that runs, it is called itself.
    answer = getattr(session, "_sess", session).run

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        feed = dict(zip(inputs, args))  # noqa: B905  `strict` takes as long as the rest of the line
        if kwargs:
            feed |= kwargs
        found: list[Any] = answer(outputs, feed, None)
        return found

    return run


def session_options(threads: int, options: OnnxRuntime = DEFAULTS) -> ort.SessionOptions:
    """One operator at a time on `threads` threads; ONNX Runtime's own graph optimisations all on (its default)."""
    session = ort.SessionOptions()
    session.intra_op_num_threads = threads
    session.inter_op_num_threads = options.inter_threads
    if options.inter_threads > 1:
        session.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    session.graph_optimization_level = GRAPH_LEVELS[options.graph_level]
    session.enable_cpu_mem_arena = options.arena
    if not options.spinning:
        session.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session.log_severity_level = 3
    return session


def lower(program: ExportedProgram, folder: Path, task: Task, rewrite: bool = True) -> ExportedFile:
    """rewrite: as `optpipe.lower.to_onnx` takes it."""
    from optpipe.forms.exported import EXPORTED
    from optpipe.lower import to_onnx

    return to_onnx(
        program,
        folder / EXPORTED["onnx"].FILE,
        input_names=task.input_names,
        output_names=task.output_names,
        rewrite=rewrite,
    )

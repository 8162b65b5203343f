"""TensorRT, on an NVIDIA GPU. Nothing of it has been run by this project's own tests, which have no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorrt as trt
import torch

from optpipe.errors import StageError
from optpipe.forms import ExportedFile
from optpipe.runtimes import Runner

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.task import Task

NAME = "tensorrt"
LONGEST = 4  # times the example's size, along a free dimension other than the batch
LOGGER = trt.Logger(trt.Logger.ERROR)


def runner(model: ExportedFile, threads: int, device: str = "cuda", options: Any = None) -> Runner:
    """An engine fits the GPU, and the version of TensorRT, that it was built with. threads: it uses none."""
    engine = trt.Runtime(LOGGER).deserialize_cuda_engine(model.path.read_bytes())
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        stream = torch.cuda.current_stream()
        held = {}
        for name, array in {**dict(zip(inputs, args, strict=False)), **kwargs}.items():
            held[name] = torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
            context.set_input_shape(name, tuple(array.shape))
        for name in outputs:
            dtype = getattr(torch, trt.nptype(engine.get_tensor_dtype(name)).__name__)
            held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=device)
        for name, tensor in held.items():
            context.set_tensor_address(name, tensor.data_ptr())
        context.execute_async_v3(stream.cuda_stream)
        return [held[name].cpu().numpy() for name in outputs]  # which waits for the stream

    return run


def lower(
    program: ExportedProgram,
    folder: Path,
    task: Task,
    fp16: bool = False,
    int8: bool = False,
    workspace_mib: int = 1024,
    largest_batch: int = 16,
) -> ExportedFile:
    """Build an engine for this machine's GPU, batches of 1 to `largest_batch`, by way of ONNX.

    Other free sizes go up to LONGEST times those of the task's example inputs, for which the engine is tuned.
    int8: of what the graph quantises itself; nothing else is calibrated.
    Raises StageError with TensorRT's reasons if the graph holds what it cannot take.
    """
    import tempfile

    from optpipe.forms.exported import EXPORTED
    from optpipe.runtimes.onnxruntime import lower as to_onnx
    from optpipe.task import tensors_in

    builder = trt.Builder(LOGGER)
    network = builder.create_network()
    parser = trt.OnnxParser(network, LOGGER)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        if not parser.parse_from_file(str(to_onnx(program, Path(partial), task).path)):
            reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise StageError(f"TensorRT cannot take this graph: {reasons}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
        for flag in [flag for flag, wanted in (("FP16", fp16), ("INT8", int8)) if wanted]:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        for i, example in enumerate(tensors_in(task.example_inputs)):
            tensor, (_, *sizes) = network.get_input(i), example.shape
            ranges = [(1, 1, largest_batch), *((1, size, LONGEST * size) for size in sizes)]
            known = [found if size < 0 else (size,) * 3 for size, found in zip(tensor.shape, ranges, strict=True)]
            profile.set_shape(tensor.name, *zip(*known, strict=True))
        config.add_optimization_profile(profile)
        serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise StageError("TensorRT could not build an engine of this graph; its log says why")
    path = folder / EXPORTED[NAME].FILE
    path.write_bytes(serialized)
    return ExportedFile(path, NAME)

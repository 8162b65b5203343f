"""ExecuTorch, whose XNNPACK kernels run on phones and Arm boards, called through its Python bindings.

Its memory is planned ahead for one batch size; a larger batch is answered part by part.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optpipe.errors import OptpipeError, StageError, named_reason
from optpipe.forms import ExportedFile
from optpipe.runtimes import Runner

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.task import Task

NAME = "executorch"


def runner(model: ExportedFile, threads: int, device: str = "cpu", options: Any = None) -> Runner:
    """Raises OptpipeError for another number of threads than cores, which its bindings have no setting for."""
    from executorch.runtime import Runtime

    if threads != os.cpu_count():
        raise OptpipeError(
            f"ExecuTorch's Python bindings always use every core, {os.cpu_count()} here, and not {threads} thread(s)"
        )
    method = Runtime.get().load_program(str(model.path)).load_method("forward")
    planned = int(method.metadata.input_tensor_meta(0).sizes()[0])

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        tensors = [torch.from_numpy(array) for array in (*args, *kwargs.values())]
        found = []
        for start in range(0, len(tensors[0]), planned):
            part = [tensor[start : start + planned] for tensor in tensors]
            missing = planned - len(part[0])
            part = [torch.cat([t, t[-1:].expand(missing, *t.shape[1:])]) if missing else t for t in part]
            outputs = method.execute([t.contiguous() for t in part])
            found.append([output.numpy()[: planned - missing].copy() for output in outputs])
        return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)]

    return run


def lower(program: ExportedProgram, folder: Path, task: Task, batch_size: int = 1) -> ExportedFile:
    """Write `program` for a fixed batch size, its parts that XNNPACK has kernels for delegated to it.

    Raises StageError with ExecuTorch's reason if it cannot.
    """
    from optpipe.forms.exported import EXPORTED
    from optpipe.progress import quiet
    from optpipe.task import arguments, batch_of

    path = folder / EXPORTED[NAME].FILE
    try:
        with warnings.catch_warnings(action="ignore"), quiet("root"):
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            args, kwargs = arguments(batch_of(task.example_inputs, batch_size))
            fixed = torch.export.export(program.module(), args, kwargs)
            lowered = to_edge_transform_and_lower(fixed, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # ExecuTorch's errors share no base class
        raise StageError(f"ExecuTorch cannot take this program: {named_reason(error)}") from error
    path.write_bytes(lowered.buffer)
    return ExportedFile(path, NAME)

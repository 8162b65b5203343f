"""PyTorch, eager."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from optpipe.runtimes import Runner
from optpipe.task import tensors_in

NAME = "torch"


def runner(model: nn.Module | ExportedProgram, threads: int) -> Runner:
    """Sets the number of threads of the whole process: PyTorch has no narrower setting."""
    torch.set_num_threads(threads)
    run_module = model.module() if isinstance(model, ExportedProgram) else model

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        with torch.inference_mode():
            outputs = run_module(*map(torch.from_numpy, args), **{k: torch.from_numpy(v) for k, v in kwargs.items()})
        return [tensor.numpy() for tensor in tensors_in(outputs)]

    return run

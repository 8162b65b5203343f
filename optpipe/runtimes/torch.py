"""PyTorch: eager, or compiled by Inductor when it is first called."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from optpipe.runtimes import Runner
from optpipe.runtimes.options import Torch
from optpipe.task import tensors_in

NAME = "torch"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
DEFAULTS = Torch()


def runner(model: nn.Module | ExportedProgram, threads: int, device: str = "cpu", options: Torch = DEFAULTS) -> Runner:
    """Sets the number of threads of the whole process: PyTorch has no narrower setting."""
    torch.set_num_threads(threads)
    on_gpu = device != "cpu"
    run_module: Any = model.module() if isinstance(model, ExportedProgram) else model
    run_module = run_module.to(device) if on_gpu else run_module
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
        torch.backends.cudnn.benchmark = options.cudnn_benchmark
    if options.channels_last:
        run_module = run_module.to(memory_format=torch.channels_last)
    if options.compile:
        run_module = torch.compile(run_module, dynamic=True)

    def tensor(array: Any) -> torch.Tensor:
        found = torch.from_numpy(array)
        if on_gpu:  # pinned, so that the copy does not wait
            found = found.pin_memory().to(device, non_blocking=True)
        if options.channels_last and found.dim() == 4:
            found = found.contiguous(memory_format=torch.channels_last)
        return found

    def precision() -> Any:
        if not options.autocast:
            return nullcontext()
        return torch.autocast(device.partition(":")[0], dtype=DTYPES[options.autocast])

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        with torch.inference_mode(), precision():
            outputs = run_module(*map(tensor, args), **{name: tensor(array) for name, array in kwargs.items()})
        found = [output.cpu() for output in tensors_in(outputs)]
        return [(output.float() if output.dtype is torch.bfloat16 else output).numpy() for output in found]

    return run

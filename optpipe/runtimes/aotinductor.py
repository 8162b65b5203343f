"""AOTInductor: a program that torch's compiler turned into a shared library ahead of time, run by torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optpipe.errors import StageError, named_reason
from optpipe.forms import ExportedFile
from optpipe.progress import quiet
from optpipe.runtimes import Runner
from optpipe.task import tensors_in

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.task import Task

NAME = "aotinductor"


def runner(model: ExportedFile, threads: int, device: str = "cpu", options: Any = None) -> Runner:
    """Sets the number of threads of the whole process, as torch does."""
    torch.set_num_threads(threads)
    compiled = torch._inductor.aoti_load_package(str(model.path))
    on_gpu = device != "cpu"

    def tensor(array: Any) -> torch.Tensor:
        found = torch.from_numpy(array)
        return found.pin_memory().to(device, non_blocking=True) if on_gpu else found

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        with torch.inference_mode():
            outputs = compiled(*map(tensor, args), **{name: tensor(array) for name, array in kwargs.items()})
        return [output.cpu().numpy() for output in tensors_in(outputs)]

    return run


def lower(
    program: ExportedProgram, folder: Path, task: Task, freezing: bool = True, max_autotune: bool = False
) -> ExportedFile:
    """Compile `program` for this machine's processor, or the device that it lies on.

    freezing, max_autotune: as in torch._inductor.config.
    Raises StageError with the compiler's reason if it cannot.
    """
    from torch._inductor import config

    from optpipe.forms.exported import EXPORTED

    path = folder / EXPORTED[NAME].FILE
    try:
        # the number of threads is that of the process which runs it, not of this one
        settings = {"freezing": freezing, "max_autotune": max_autotune, "cpp.dynamic_threads": True}
        with config.patch(settings), torch.no_grad(), warnings.catch_warnings(action="ignore"), quiet("torch"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's own errors share no base class
        raise StageError(f"AOTInductor cannot compile this program: {named_reason(error)}") from error
    return ExportedFile(path, NAME)

"""Export to TensorRT.

Takes an exported program, gives an engine for the NVIDIA GPU that it is built on. Needs that GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.forms import ExportedFile
    from optpipe.target import Target


@register(
    "export/tensorrt", takes="program", gives="tensorrt", requires=("tensorrt",), extra="optpipe[tensorrt]",
    compiles=True,
)  # fmt: skip
@dataclass(kw_only=True)
class TensorRt:
    """Build and save an engine. It fits the GPU and the version of TensorRT that it was built with."""

    fp16: bool = True  # let TensorRT compute in half precision where that is faster
    int8: bool = False  # take over the integers of a quantised graph
    workspace_mib: int = 1024  # of GPU memory that its kernels may use

    def __post_init__(self) -> None:
        if self.workspace_mib < 1:
            raise ValueError(f"workspace_mib is {self.workspace_mib}; it must be at least 1")

    def problems(self, target: Target) -> list[str]:
        if target.device == "cpu":
            return [
                "an engine is built on a GPU, but target.device is 'cpu'; set target.device=cuda where there is one"
            ]
        return []

    def run(self, model: ExportedProgram, ctx: Context) -> ExportedFile:
        from optpipe.lower import refuse_unused_inputs
        from optpipe.runtimes.tensorrt import lower

        refuse_unused_inputs(model)
        if self.fp16:
            ctx.computes_in("half")
        return lower(
            model, ctx.dir, ctx.task, fp16=self.fp16, int8=self.int8, workspace_mib=self.workspace_mib,
            largest_batch=max(ctx.target.batch_sizes),
        )  # fmt: skip

"""Export to ExecuTorch, for phones and Arm boards.

Takes an exported program, gives an ExecuTorch program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.forms import ExportedFile


@register(
    "export/executorch", takes="program", gives="executorch", requires=("executorch",), extra="optpipe[executorch]"
)
@dataclass(kw_only=True)
class ExecuTorch:
    """A .pte file whose operators XNNPACK computes where it has kernels for them; memory is planned ahead."""

    batch_size: int = 1  # that memory is planned for; larger batches are answered part by part

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")

    def run(self, model: ExportedProgram, ctx: Context) -> ExportedFile:
        from optpipe.lower import refuse_unused_inputs
        from optpipe.runtimes.executorch import lower

        refuse_unused_inputs(model)
        return lower(model, ctx.dir, ctx.task, batch_size=self.batch_size)

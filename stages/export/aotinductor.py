"""Export to AOTInductor.

Takes an exported program, gives a package that torch runs: a shared library, compiled ahead of time, and its weights.
Needs a C++ compiler.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.forms import ExportedFile
    from optpipe.target import Target


@register("export/aotinductor", takes="program", gives="aotinductor", compiles=True)
@dataclass(kw_only=True)
class AotInductor:
    """torch's own compiler ahead of time: for this machine's processor, and no other.

    freezing packs weights as the kernels like them, and is what makes int8 fast. torch 2.13 compiles an int8 network
    with residual sums wrongly that way, which parity refuses; freezing=false computes it in float.
    """

    freezing: bool = True
    max_autotune: bool = False  # time several kernels of each matrix product while compiling, and keep the fastest

    def problems(self, target: Target) -> list[str]:
        if not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
            return ["AOTInductor compiles C++, and there is no g++ or clang++ here; install one"]
        return (
            []
            if target.is_host
            else [f"AOTInductor compiles for the machine that it runs on, but {target.elsewhere()}"]
        )

    def run(self, model: ExportedProgram, ctx: Context) -> ExportedFile:
        from optpipe.lower import refuse_unused_inputs
        from optpipe.runtimes.aotinductor import lower

        refuse_unused_inputs(model)
        return lower(model, ctx.dir, ctx.task, self.freezing, self.max_autotune)

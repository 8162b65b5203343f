"""Export to OpenVINO's own format.

Takes an exported program or an ONNX file, gives an OpenVINO IR: model.xml and model.bin.
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
    "export/openvino", takes=("program", "onnx"), gives="openvino", requires=("openvino",), extra="optpipe[openvino]"
)
@dataclass(kw_only=True)
class OpenVino:
    """An IR by way of ONNX, whose integer arithmetic OpenVINO takes over as it is."""

    half: bool = False  # store the weights that stay float in 16 bits: half the file; they are computed as before

    def run(self, model: ExportedProgram | ExportedFile, ctx: Context) -> ExportedFile:
        import tempfile
        from pathlib import Path

        from optpipe.forms import ExportedFile
        from optpipe.lower import refuse_unused_inputs
        from optpipe.runtimes.openvino import lower, to_ir

        if self.half:
            ctx.computes_in("half")
        if isinstance(model, ExportedFile):
            return to_ir(model, ctx.dir, self.half)
        refuse_unused_inputs(model)
        with tempfile.TemporaryDirectory() as folder:
            return to_ir(lower(model, Path(folder), ctx.task), ctx.dir, self.half)

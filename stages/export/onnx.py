"""Export to ONNX.

Takes an exported program, gives an ONNX file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from optpipe.forms import ExportedFile


@register("export/onnx", takes="program", gives="onnx", requires=("onnx", "onnxscript"))
@dataclass(kw_only=True)
class Onnx:
    """ONNX by torch's dynamo exporter: named inputs and outputs, free sizes, checked, without debug metadata.

    What is free, such as the batch size, is what the trace left free. Weights of more than 2 GB lie beside the graph,
    in model.onnx.data.
    """

    opset: int | None = None  # by default 20; 23 for a model with attention, the first that has an operator for it
    input_names: list[str] | None = None  # by default the task's, else those of `forward`
    output_names: list[str] | None = None
    metadata: dict[str, str] = field(default_factory=dict)  # written into the file, for example {version: "3"}

    def __post_init__(self) -> None:
        if self.opset is not None and not 18 <= self.opset <= 23:
            raise ValueError(f"opset is {self.opset}; torch's exporter writes 18 to 23")

    def run(self, model: ExportedProgram, ctx: Context) -> ExportedFile:
        import onnx

        from optpipe.forms.exported import EXPORTED
        from optpipe.lower import refuse_unused_inputs, to_onnx

        refuse_unused_inputs(model)
        exported = to_onnx(
            model,
            ctx.dir / EXPORTED["onnx"].FILE,
            input_names=self.input_names or ctx.task.input_names,
            output_names=self.output_names or ctx.task.output_names,
            opset=self.opset,
            metadata=self.metadata,
        )
        ctx.record(opset=onnx.load(exported.path, load_external_data=False).opset_import[0].version)
        return exported

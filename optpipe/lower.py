"""The two steps that take a model out of Python: torch.export, and from there an ONNX file.

The stages `trace` and `export` take them for good; the pipeline takes them for previews, so that the figures of all
steps are those of a file that the target could run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from optpipe import operators
from optpipe.capture import capture
from optpipe.errors import StageError, named_reason
from optpipe.forms.exported import EXPORTED, ExportedFile
from optpipe.progress import quiet
from optpipe.rewrite import derive_bias_scales, use_global_pooling, use_packed_attention
from optpipe.task import Task

if TYPE_CHECKING:
    import onnx_ir

MAX_FILE_BYTES = 2**31 - 2**20  # of weights; protobuf takes no more, the graph included
MEMORY = {"memory_format": torch.contiguous_format}
OPSET = 20
ATTENTION_OPSET = 23  # the first that has the operator


def trace(model: nn.Module, task: Task, *, training: bool = False) -> ExportedProgram:
    """`model` as an ExportedProgram whose batch size is free, as `capture` does it: the fast way, else the other.

    Raises StageError with the reason of the slower way, which reads the source, if neither captures it.
    """
    try:
        return capture(model, task, strict=False, training=training)
    except StageError as error:
        if isinstance(model, fx.GraphModule):  # holds no Python to read
            raise StageError(f"torch.export cannot capture this model as a graph: {error}") from error
    try:
        return capture(model, task, strict=True, training=training)
    except StageError as error:
        raise StageError(f"torch.export cannot capture this model as a graph: {error}") from error


def to_onnx(
    program: ExportedProgram,
    path: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    rewrite: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> ExportedFile:
    """Write `program` to `path` as ONNX, checked, with nothing in it but the model: equal programs give equal bytes.

    Weights of more than MAX_FILE_BYTES, which one file cannot hold, lie beside it.

    rewrite: whether to use the operators that runtimes have the best kernels for where torch's exporter does not, and
        to store no scale that follows from others.
    opset: by default OPSET, or ATTENTION_OPSET where the graph is rewritten and holds attention.
    metadata: written into the file.
    Raises StageError if an operator has no ONNX form or the file does not pass ONNX's checker.
    """
    import onnx

    from optpipe import torchlib

    if opset is None:
        opset = ATTENTION_OPSET if rewrite and _has_attention(program) else OPSET
    try:
        # it warns that there is no torchvision
        with quiet("torch.onnx._internal.exporter._registration"), torchlib.built_once(), _views_of_copies(program):
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=operators.translations(),
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter's own errors share no base class
        raise StageError(f"torch.onnx cannot export this program: {_why_not_onnx(error, program, opset)}") from error
    assert exported is not None
    operators.restore(exported.model)
    if rewrite:
        use_global_pooling(exported.model)
        use_packed_attention(exported.model)
        derive_bias_scales(exported.model)
    _name_batch_dimension(exported.model)
    _write(exported.model, path, metadata or {})
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"the exported graph is not valid ONNX: {named_reason(error)}") from error
    return ExportedFile(path, "onnx")


def _why_not_onnx(error: BaseException, program: ExportedProgram, opset: int) -> str:
    """The operator that has no ONNX form and the line that calls it, or the innermost reason that there is."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    operator = re.search(r"op='([\w:.]+)'", str(chain[-1]))
    if operator is None:
        return named_reason(chain[-1])
    name = operator.group(1).rpartition(".")[2]
    calls = [node for node in program.graph.nodes if name in str(node.target)]
    trace = calls[0].meta.get("stack_trace", "") if calls else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]+)', trace)
    where = f", which {lines[-1][0]}:{lines[-1][1]} calls: {lines[-1][2].strip()}" if lines else ""
    return f"opset {opset} has nothing for '{operator.group(1)}'{where}; raise export.opset, or use others"


def _write(model: onnx_ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    import onnx
    import onnx_ir as ir

    held = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if held > MAX_FILE_BYTES:
        ir.save(model, path, external_data=EXPORTED["onnx"].FILES[1])
        proto = onnx.load(path, load_external_data=False)
    else:
        proto = ir.to_proto(model)
    strip(proto)
    onnx.helper.set_model_props(proto, dict(metadata))
    path.write_bytes(proto.SerializeToString(deterministic=True))


def refuse_unused_inputs(program: ExportedProgram) -> None:
    """Raises StageError if there is an input that the graph never reads."""
    inputs = set(program.graph_signature.user_inputs)
    unused = [
        node.name for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs and not node.users
    ]
    if unused:
        raise StageError(
            f"the graph never uses the input {', '.join(map(repr, unused))}; leave it out of the task's inputs, or see "
            "why `forward` ignores it"
        )


@contextlib.contextmanager
def _views_of_copies(program: ExportedProgram) -> Iterator[None]:
    """A view of a transposed tensor fits the strides that attention gave it while it was captured.

    Those that the exporter computes may be others. Of a copy there is always a view, and ONNX has neither strides nor
    copies.
    """
    aten = torch.ops.aten
    views = (aten.view.default, aten.reshape.default)
    transposed = (aten.transpose.int, aten.permute.default, aten.contiguous.default)  # a no-op where it was one
    graph, copies = program.graph, []
    for node in list(graph.nodes) if _has_attention(program) else ():
        source = node.args[0] if node.target in views else None
        if isinstance(source, fx.Node) and source.target in transposed:
            with graph.inserting_before(node):
                copies.append(graph.call_function(aten.clone.default, (source,), MEMORY))
            copies[-1].meta.update(source.meta)
            node.replace_input_with(source, copies[-1])
    try:
        yield
    finally:
        for copy in copies:
            copy.replace_all_uses_with(copy.args[0])
            graph.erase_node(copy)


def _has_attention(program: ExportedProgram) -> bool:
    return any(node.target is torch.ops.aten.scaled_dot_product_attention.default for node in program.graph.nodes)


def _name_batch_dimension(model: onnx_ir.Model) -> None:
    """The free first dimension of every input and output is called "batch"; torch names it by a running number."""
    import onnx_ir as ir

    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape(["batch", *value.shape[1:]])


def strip(proto: Any) -> None:
    """Remove names, source paths and stack traces that only debuggers read: most of a small model's file."""
    for holder in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    for initializer in proto.graph.initializer:
        initializer.ClearField("metadata_props")
        initializer.ClearField("doc_string")
    proto.graph.ClearField("value_info")

"""Simplify a graph: what torch's exporter leaves for others to tidy.

Takes and gives an ONNX file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError, named_reason
from optpipe.registry import register

if TYPE_CHECKING:
    import onnx

    from optpipe.forms import ExportedFile
    from optpipe.target import Target


class Offline(Enum):
    """ONNX Runtime's graph optimisations that are written into the file."""

    none = "none"
    basic = "basic"  # standard operators: the file stays good for every runtime
    extended = "extended"  # operators of ONNX Runtime's own: no other runtime reads the file


@register("simplify/graph", takes="onnx", gives="onnx", requires=("onnxslim",), extra="optpipe[onnxslim]")
@dataclass(kw_only=True)
class Graph:
    """Fold constants, drop what has no reader, join operators; the file with fewer bytes is kept.

    By onnxslim (https://github.com/inisis/OnnxSlim) and, if asked for, by ONNX Runtime's own optimisations, which it
    would otherwise do each time that it loads the file.
    """

    slim: bool = True  # by onnxslim
    offline: Offline = Offline.none  # by ONNX Runtime

    def __post_init__(self) -> None:
        if not self.slim and self.offline is Offline.none:
            raise ValueError("slim is false and offline none; nothing would be done")

    def run(self, model: ExportedFile, ctx: Context) -> ExportedFile:
        import onnx

        from optpipe import parity
        from optpipe.forms import ExportedFile, form
        from optpipe.forms.exported import EXPORTED
        from optpipe.lower import strip

        if len(form("onnx").files(model.path.parent)) > 1:
            raise StageError("the file's weights lie beside it, since one file cannot hold them; leave this step out")
        before = onnx.load(model.path)
        after = self._optimised(before, ctx.dir)
        strip(after)
        _check(before, after)
        target = ctx.dir / EXPORTED["onnx"].FILE
        target.write_bytes(after.SerializeToString(deterministic=True))
        same = parity.check(
            form("onnx").as_callable(model),
            form("onnx").as_callable(ExportedFile(target, "onnx")),
            ctx.task,
            precision=parity.precision(model),
        )
        sizes = [
            (path.stat().st_size, len(graph.graph.node)) for path, graph in ((model.path, before), (target, after))
        ]
        ctx.record(nodes_before=sizes[0][1], nodes=sizes[1][1], bytes_before=sizes[0][0], bytes=sizes[1][0])
        found = f"{sizes[0][1]} → {sizes[1][1]} operators, {sizes[0][0]} → {sizes[1][0]} bytes"
        if sizes[1] >= sizes[0]:
            target.write_bytes(model.path.read_bytes())
            ctx.note(f"the file stays as it was: {found} would not have made it smaller")
        else:
            ctx.note(f"{found}; {same.note()}")
        return ExportedFile(target, "onnx")

    def problems(self, target: Target) -> list[str]:
        if self.offline is Offline.extended and target.runtime != "onnxruntime":
            return [f"offline=extended writes operators that {target.runtime} does not have; use offline=basic"]
        return []

    def _optimised(self, graph: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        found = _slimmed(graph) if self.slim else graph
        return found if self.offline is Offline.none else _offline(found, self.offline, folder)


def _slimmed(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The smaller of two: constants that follow from others, such as scales of an int8 bias, may take more bytes."""
    import onnx
    import onnxslim

    found = []
    for skipped in ([], ["constant_folding"]):
        copied = onnx.ModelProto()
        copied.CopyFrom(graph)
        try:
            found.append(onnxslim.slim(copied, skip_optimizations=skipped or None))
        except Exception as error:  # its own and those of onnx
            raise StageError(f"onnxslim cannot simplify this graph: {named_reason(error)}; set slim=false") from error
    slimmed: onnx.ModelProto = min(found, key=lambda proto: proto.ByteSize())
    return slimmed


def _offline(graph: onnx.ModelProto, level: Offline, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime would run after its optimisations up to `level`."""
    import onnx
    import onnxruntime as ort

    from optpipe.runtimes.onnxruntime import session_options

    levels = ort.GraphOptimizationLevel
    options = session_options(threads=1)
    options.graph_optimization_level = {"basic": levels.ORT_ENABLE_BASIC, "extended": levels.ORT_ENABLE_EXTENDED}[
        level.value
    ]
    path = folder / "offline.onnx"
    options.optimized_model_filepath = str(path)
    try:
        ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = onnx.load(path)
    except Exception as error:  # ONNX Runtime's errors share no public base class
        raise StageError(f"ONNX Runtime cannot optimise this graph: {named_reason(error)}; set offline=none") from error
    finally:
        path.unlink(missing_ok=True)
    used = {node.domain for node in found.graph.node} | {""}
    for version in [version for version in found.opset_import if version.domain not in used]:
        found.opset_import.remove(version)
    return found


def _check(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Raise StageError unless `after` is valid ONNX with the inputs and outputs of `before`."""
    import onnx

    for kind in ("input", "output"):
        was, now = (
            {value.name: value.type.SerializeToString(deterministic=True) for value in getattr(proto.graph, kind)}
            for proto in (before, after)
        )
        if list(was.items()) != list(now.items()):
            changed = sorted({name for name, _ in was.items() ^ now.items()}) or list(was)
            raise StageError(
                f"simplifying drops or changes the {kind} {', '.join(changed)}, as where nothing reads one; "
                "leave it out of the model, or the step out of the pipeline"
            )
    try:
        onnx.checker.check_model(after, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise StageError(f"the simplified graph is not valid ONNX: {named_reason(error)}") from error

"""Trace: capture a module as one graph.

Takes a torch module, gives an exported program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.registry import register

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


@register("trace/program", takes="torch", gives="program")
@dataclass(kw_only=True)
class Program:
    """torch.export, with a batch size that stays free."""

    def run(self, model: nn.Module, ctx: Context) -> ExportedProgram:
        from optpipe.lower import MAX_BATCH, trace

        program = trace(model, ctx.task)
        operators = sum(node.op == "call_function" for node in program.graph.nodes)
        ctx.record(operators=operators)
        ctx.note(f"captured {operators} operators; batch size free from 1 to {MAX_BATCH}")
        return program

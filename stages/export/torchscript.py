"""Export to TorchScript, which torch has deprecated and which some deployments still load.

Takes and gives a TorchScript module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe.context import Context
from optpipe.errors import StageError, named_reason
from optpipe.registry import register

if TYPE_CHECKING:
    from torch.jit import ScriptModule


@register("export/torchscript", takes="torchscript", gives="torchscript")
@dataclass(kw_only=True)
class TorchScript:
    """Weights become constants of the graph, which is then folded and stripped of what only training needs."""

    def run(self, model: ScriptModule, ctx: Context) -> ScriptModule:
        import warnings

        import torch

        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                frozen: ScriptModule = torch.jit.freeze(model.eval())
        except RuntimeError as error:
            raise StageError(f"torch.jit.freeze cannot take this module: {named_reason(error)}") from error
        return frozen

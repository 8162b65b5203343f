"""optpipe: a declarative PyTorch model-optimisation pipeline whose every number is measured.

The names below are the whole public API. They are imported when first used, so that `import optpipe`, `--help` and a
configuration error never wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optpipe.context import Context as Context
    from optpipe.errors import OptpipeError as OptpipeError
    from optpipe.errors import RecipeError as RecipeError
    from optpipe.errors import StageError as StageError
    from optpipe.forms import ExportedFile as ExportedFile
    from optpipe.manifest import DeployedModel as DeployedModel
    from optpipe.manifest import load as load
    from optpipe.notebook import Result as Result
    from optpipe.notebook import optimize as optimize
    from optpipe.registry import register as register
    from optpipe.task import Metric as Metric
    from optpipe.task import Task as Task

_HOME = {
    "Context": "context",
    "DeployedModel": "manifest",
    "ExportedFile": "forms",
    "Metric": "task",
    "OptpipeError": "errors",
    "RecipeError": "errors",
    "Result": "notebook",
    "StageError": "errors",
    "Task": "task",
    "load": "manifest",
    "optimize": "notebook",
    "register": "registry",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"optpipe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

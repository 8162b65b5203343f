"""optpipe: a declarative PyTorch model-optimisation pipeline whose every number is measured.

The names below are the whole public API. They are imported when first used, so that `import optpipe`, `--help` and a
configuration error never wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optpipe.context import Context as Context
    from optpipe.deployed import DeployedModel as DeployedModel
    from optpipe.deployed import load as load
    from optpipe.errors import OptpipeError as OptpipeError
    from optpipe.errors import RecipeError as RecipeError
    from optpipe.errors import StageError as StageError
    from optpipe.forms import ExportedFile as ExportedFile
    from optpipe.metrics import Metric as Metric
    from optpipe.metrics import f1 as f1
    from optpipe.metrics import mean_absolute_error as mean_absolute_error
    from optpipe.metrics import mean_squared_error as mean_squared_error
    from optpipe.metrics import multilabel_accuracy as multilabel_accuracy
    from optpipe.metrics import r2 as r2
    from optpipe.metrics import top1_accuracy as top1_accuracy
    from optpipe.notebook import Result as Result
    from optpipe.notebook import optimize as optimize
    from optpipe.registry import register as register
    from optpipe.report import Table as Table
    from optpipe.task import Task as Task

_HOME = {
    "Context": "context",
    "DeployedModel": "deployed",
    "ExportedFile": "forms",
    "Metric": "metrics",
    "OptpipeError": "errors",
    "RecipeError": "errors",
    "Result": "notebook",
    "StageError": "errors",
    "Table": "report",
    "Task": "task",
    "f1": "metrics",
    "load": "deployed",
    "mean_absolute_error": "metrics",
    "mean_squared_error": "metrics",
    "multilabel_accuracy": "metrics",
    "optimize": "notebook",
    "r2": "metrics",
    "register": "registry",
    "top1_accuracy": "metrics",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"optpipe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

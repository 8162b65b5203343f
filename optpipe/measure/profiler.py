"""The process that profiles a module in eager PyTorch: `python -m optpipe.measure.profiler`. JSON in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from optpipe.forms import form
from optpipe.measure import child
from optpipe.measure.worker import bound_call
from optpipe.runtimes import make_runner

WARM_UP_CALLS, CALLS = 3, 10


def trace(request: dict[str, Any]) -> dict[str, Any]:
    """Leave a Chrome trace of a few calls of the module saved in `folder` at `path`; TensorBoard reads it too."""
    run = make_runner("torch", form("torch").load(Path(request["folder"])), int(request["threads"]))
    call = bound_call(run, request["inputs"])
    for _ in range(WARM_UP_CALLS):
        call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, torch.no_grad():
        for _ in range(CALLS):
            call()
    Path(request["path"]).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(request["path"])
    return {"calls": CALLS}


if __name__ == "__main__":
    child.serve(trace)

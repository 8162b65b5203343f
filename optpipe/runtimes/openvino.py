"""OpenVINO, on a processor.

Where float stays float: a processor with 16-bit instructions would compute it in bfloat16 unless told otherwise.
"""

from __future__ import annotations

import threading
from typing import Any

import openvino as ov

from optpipe.forms import ExportedFile
from optpipe.runtimes import Runner

NAME = "openvino"


def runner(model: ExportedFile, threads: int) -> Runner:
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    compiled = ov.Core().compile_model(model.path, "CPU", settings)
    names = [port.any_name for port in compiled.inputs]
    own = threading.local()  # a request answers one call at a time

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer({**dict(zip(names, args, strict=False)), **kwargs}, share_inputs=True)
        return list(found.values())

    return run

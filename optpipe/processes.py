"""Training in several processes: each has the whole model and a part of every batch; gradients are averaged."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch

from optpipe.checkpoint import random_state, set_random_state
from optpipe.errors import StageError
from optpipe.training import History, Training, make_fabric, train

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train_in_processes(training: Training, device: torch.device) -> History:
    """Data-parallel training (Li et al. 2020) on CPUs by gloo, on GPUs by NCCL; the model here gets the result."""
    processes = training.schedule.processes
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise StageError(f"processes is {processes}, but this machine has {torch.cuda.device_count()} GPU(s)")
    training.model.to("cpu")
    try:
        payload = cloudpickle.dumps((training, random_state()))
    except Exception as error:  # the user's own model or data: whatever its pickling raises
        raise StageError(
            f"processes is {processes}, but the model, data or loss cannot be sent to other processes "
            f"({type(error).__name__}: {error}); set processes to 1"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        port = os.environ.pop("MASTER_PORT", None)
        try:
            make_fabric(device, training.schedule.precision, processes).launch(_work, payload, str(result))
        except Exception:
            if not result.exists():  # else the first process has said why it gave up, and the others missed it
                raise
        finally:
            os.environ.pop("MASTER_PORT", None)
            if port is not None:
                os.environ["MASTER_PORT"] = port
        found = torch.load(result, weights_only=True)
    if found["error"] is not None:
        raise StageError(found["error"])
    training.model.load_state_dict(found["model"])
    return History(**found["history"])


def _work(fabric: Fabric, payload: bytes, result: str) -> None:
    """One of the processes; the first one writes what came out."""
    training: Training
    training, state = cloudpickle.loads(payload)
    set_random_state(state)
    try:
        history = train(training, fabric)
        found: dict[str, Any] = {"error": None, "model": training.model.cpu().state_dict(), "history": asdict(history)}
    except StageError as error:
        found = {"error": str(error)}
    if fabric.is_global_zero:
        torch.save(found, result)

"""Checkpoint: the state of a training after an epoch, from which a killed one goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optpipe.errors import StageError
from optpipe.forms.torch import content_hash, update_with_tensor
from optpipe.schedule import Schedule
from optpipe.task import Task, tensors_in

if TYPE_CHECKING:
    from torch import nn

FILE = "training.ckpt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where the state is kept, and of which training it is."""

    folder: Path
    of: dict[str, str] = field(default_factory=dict)  # what the training depends on beside its model and schedule
    is_spare: bool = False  # nobody asked for it: one that cannot be used is left, and the training begins anew

    @property
    def path(self) -> Path:
        return self.folder / FILE

    def complete(self, model: nn.Module, schedule: Schedule) -> Checkpoint:
        """This one, of the training of `model` as it is now by `schedule`."""
        settings = {
            item.name: str(getattr(schedule, item.name))
            for item in dataclasses.fields(Schedule)  # a stage's other settings are in `of`
        }
        return replace(self, of={"model": content_hash(model), **settings, **self.of})

    def read(self) -> dict[str, Any] | None:
        """The state that was kept, or None if there is none. StageError if it is of another training."""
        try:
            return self._read()
        except StageError:
            if not self.is_spare:
                raise
            self.remove()
            return None

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            of = state["of"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, OSError) as error:
            raise StageError(
                f"'{self.path}' cannot be read as the state of a training ({type(error).__name__}); delete it"
            ) from error
        other = [name for name in {**self.of, **of} if self.of.get(name) != of.get(name)]
        if other:
            told = ", ".join(f"{name} {_short(of.get(name))} instead of {_short(self.of.get(name))}" for name in other)
            raise StageError(
                f"'{self.path}' is the state of another training: {told}; name another folder, or delete the file to "
                "begin anew"
            )
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Keep `state`. Whoever is killed meanwhile leaves the one before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"of": self.of, **state}, partial)
        partial.replace(self.path)

    def remove(self) -> None:
        """The training has ended, there is nothing to go on with."""
        self.path.unlink(missing_ok=True)


def data_of(task: Task) -> str:
    """What identifies the data of `task`: its fingerprint, or else its example inputs."""
    if task.fingerprint:
        return task.fingerprint
    digest = hashlib.sha256()
    for tensor in tensors_in(task.example_inputs):
        update_with_tensor(digest, "", tensor)
    return digest.hexdigest()


def random_state() -> dict[str, Any]:
    """That of every generator which a training may draw from, in types that torch reads with weights_only=True."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


def _short(value: str | None) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text

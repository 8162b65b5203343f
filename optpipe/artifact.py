"""Artifact: a model that was saved, loaded when somebody needs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optpipe.forms import Form, form, form_of
from optpipe.forms.exported import EXPORTED


@dataclass(frozen=True)
class Artifact:
    """A model of one form in a folder. Equal content has equal hashes, wherever it lies."""

    form: Form
    folder: Path
    hash: str  # of the content

    @classmethod
    def save(cls, model: Any, folder: Path) -> Artifact:
        """`model`, which has one of the forms, written to `folder` and read back: what is judged is what was saved."""
        found = form_of(model)
        assert found is not None
        found.save(model, folder)
        loaded = found.load(folder)
        artifact = cls(found, folder, found.content_hash(loaded))
        artifact.__dict__["model"] = loaded
        return artifact

    @classmethod
    def kept(cls, form_name: str, folder: Path, hash: str) -> Artifact:
        """What lies in `folder` already."""
        return cls(form(form_name), folder, hash)

    @cached_property
    def model(self) -> Any:
        """The one that is judged and measured; nobody may change it."""
        return self.form.load(self.folder)

    @contextmanager
    def lent(self) -> Iterator[Any]:
        """The model for a stage, which may change it.

        Of a file it is a copy. A program takes long to load and a stage seldom changes it: it is given the one that is
        judged, which is loaded again if the stage fails or its content is another afterwards.
        """
        if self.form.NAME in EXPORTED:
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                self.form.save(self.form.load(self.folder), Path(name))
                yield self.form.load(Path(name))
            return
        if self.form.NAME != "program":
            yield self.form.load(self.folder)
            return
        try:
            yield self.model
            is_changed = self.form.content_hash(self.model) != self.hash
        except BaseException:
            self.__dict__.pop("model", None)
            raise
        if is_changed:
            del self.__dict__["model"]

    def unloaded(self) -> Artifact:
        """The same without the memory that a loaded model takes."""
        return replace(self)

"""The store: results of stages, and what was measured of them, by what they depend on.

An entry is a folder, `<kind>/<first two characters>/<sha256 of its key>`, with entry.json and `files`. It is written
aside and renamed, and every file is compared with its sha256 when it is read: what is damaged, foreign or of another
version counts as missing. Stages' models are pickles of the user's own: the folder must be the user's alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from optpipe.machine import user_cache
from optpipe.progress import say

KINDS = ("step", "figures", "predictions", "rehearsal", "plan")
DIGEST = re.compile(r"[0-9a-f]{64}")
FORMAT = 1  # of entries; those of another are not read
ENTRY, FILES = "entry.json", "files"
KEY_FILE = "key.json"  # in the folder of a run's step: what its result depends on
ASIDE, LOCKS, ADDED = "aside", "locks", "added"  # beside the kinds
PARTIAL = "partial"
GIGABYTE = 10**9
COLLECT_AFTER = 0.05  # of the limit that was added since the last look at the whole store
ABANDONED_SECONDS = 86400.0  # after which what a killed process left is removed
CHUNK = 1 << 20
Files = Mapping[str, Path]
NO_FILES: Files = {}


@dataclass(kw_only=True)
class Settings:
    """The settings under `store:`."""

    enabled: bool = True
    folder: str | None = None  # null: in the user's cache folder
    limit_gb: float = 10.0  # the least recently used results above it are removed

    def __post_init__(self) -> None:
        if not self.limit_gb > 0:
            raise ValueError(f"limit_gb is {self.limit_gb:g}; it must be above 0, or do without: store=none")


@dataclass(frozen=True)
class Key:
    """What a result depends on: each part by name, in values that JSON holds."""

    kind: str  # "step", "figures", …
    parts: dict[str, Any] = field(hash=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(_canonical({"kind": self.kind, "parts": self.parts})).hexdigest()

    def spoken(self) -> str:
        return f"{self.kind} {self.parts.get('stage', '')}".strip()


@dataclass(frozen=True)
class Entry:
    """What entry.json holds."""

    key: Key
    content: dict[str, Any]
    files: dict[str, str]  # sha256 by the path below `files`
    size_bytes: int
    made: float  # seconds since 1970
    path: Path

    @property
    def used(self) -> float:
        """When it was used last, in seconds since 1970; never later than now, whatever a clock said."""
        try:
            return min(time.time(), (self.path / ENTRY).stat().st_mtime)
        except FileNotFoundError:  # another process has removed it
            return 0.0


class Damaged(Exception):
    """An entry that cannot be trusted."""


class Results(Protocol):
    """What the pipeline asks of a store."""

    def get(self, key: Key, into: Path | None = None) -> dict[str, Any] | None: ...
    def put(self, key: Key, content: dict[str, Any], files: Files = NO_FILES, *, replace: bool = False) -> None: ...
    def alone(self, key: Key) -> Any: ...
    def partial(self, key: Key) -> Path | None: ...
    def done(self, key: Key) -> None: ...
    def close(self) -> None: ...


def open_store(settings: Settings) -> Results:
    """The store that `settings` name; one that keeps nothing, and says why, where that cannot be used."""
    if not settings.enabled:
        return NoStore()
    root = Path(settings.folder).expanduser() if settings.folder else user_cache() / "store"
    if reason := refusal(root):
        say(f"store: {reason}; this run goes on without one")
        return NoStore()
    return Store(root, settings.limit_gb)


def refusal(root: Path) -> str:
    """Why `root`, made where it is missing, cannot hold results; empty if it can."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = root.stat()
    except OSError as error:
        return f"{root} cannot be made ({error.strerror}); choose another folder with store.folder=…"
    if not root.is_dir():
        return f"{root} is not a folder; choose another with store.folder=…"
    if hasattr(os, "getuid") and state.st_uid != os.getuid():
        return (
            f"{root} belongs to another user, and results are pickles; choose a folder of your own with store.folder=…"
        )
    if state.st_mode & 0o022:
        return f"others may write to {root}, and results are pickles; chmod go-w {root}"
    return ""


class NoStore:
    """Keeps nothing."""

    def get(self, key: Key, into: Path | None = None) -> dict[str, Any] | None:
        return None

    def put(self, key: Key, content: dict[str, Any], files: Files = NO_FILES, *, replace: bool = False) -> None:
        """Nothing to do."""

    @contextmanager
    def alone(self, key: Key) -> Iterator[None]:
        yield

    def partial(self, key: Key) -> Path | None:
        return None

    def done(self, key: Key) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Store:
    """Entries below `root`, a folder of this user's alone."""

    def __init__(self, root: Path, limit_gb: float) -> None:
        self.root, self.limit_bytes = root, int(limit_gb * GIGABYTE)
        self._is_writable = True

    def get(self, key: Key, into: Path | None = None) -> dict[str, Any] | None:
        """The content of the entry of `key`, its files copied `into` a folder; None if there is none to be trusted."""
        path = self._path(key)
        try:
            entry = read(path)
            if into is not None:
                _copy_checked(entry, into)
        except FileNotFoundError:
            if not (path / ENTRY).exists():
                return None
            self._drop(path, key, "a file is missing")
            return None
        except (Damaged, OSError) as error:
            self._drop(path, key, str(error))
            return None
        try:
            os.utime(path / ENTRY)
        except OSError:
            pass  # a store that cannot be written to is still read; nothing is removed from it either
        return entry.content

    def put(self, key: Key, content: dict[str, Any], files: Files = NO_FILES, *, replace: bool = False) -> None:
        """Keep `content`, of what JSON holds, and `files`; an entry that is there stays, unless it is to be replaced.

        files: by the name that each will have below the folder of `get`.
        """
        path = self._path(key)
        if not self._is_writable or (path.exists() and not replace):
            return
        aside = self.root / ASIDE / uuid.uuid4().hex
        try:
            aside.mkdir(parents=True, mode=0o700)
            size = _write(aside, key, content, files)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if replace:
                self.remove(path)
            try:
                aside.rename(path)
            except OSError:
                if not path.exists():
                    raise
                shutil.rmtree(aside)  # another process was faster
                return
            with (self.root / ADDED).open("a") as added:
                added.write(f"{size}\n")
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            self._is_writable = False
            say(f"store: {self.root} cannot be written to ({error.strerror}); from here on nothing is kept")
        except (TypeError, ValueError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            say(f"store: the {key.spoken()} is not kept: what it recorded cannot be written as JSON ({error})")

    @contextmanager
    def alone(self, key: Key) -> Iterator[None]:
        """Hold `key` while its result is computed; waits for another process that does."""
        from filelock import FileLock, Timeout

        try:
            (self.root / LOCKS).mkdir(exist_ok=True, mode=0o700)
            lock = FileLock(self.root / LOCKS / key.digest)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say(f"store: waiting for another run that computes the same {key.spoken()} …")
                lock.acquire()
        except OSError:  # read-only: put says so
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def partial(self, key: Key) -> Path | None:
        """A folder for what a computation leaves while it goes on, should it be killed; None if it cannot be made."""
        folder = self.root / PARTIAL / key.digest
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return None
        return folder

    def done(self, key: Key) -> None:
        """Remove the folder of `partial`."""
        shutil.rmtree(self.root / PARTIAL / key.digest, ignore_errors=True)

    def close(self) -> None:
        """Keep the limit on the size; the whole store is only looked at once enough was added."""
        try:
            added = sum(map(int, (self.root / ADDED).read_text().split()))
        except (OSError, ValueError):
            return
        if added <= COLLECT_AFTER * self.limit_bytes:
            return
        try:
            self.collect(self.limit_bytes)
        except OSError as error:  # another process does the same, or it is read-only: no run fails by that
            say(f"store: {self.root} could not be kept to its limit ({error.strerror})")

    def entries(self) -> Iterator[Entry]:
        """All that can be read, without a look at their files."""
        for path in self.paths():
            try:
                yield read(path)
            except (Damaged, OSError):
                continue

    def paths(self) -> Iterator[Path]:
        """The folder of every entry."""
        for kind in KINDS:
            yield from (path for path in sorted((self.root / kind).glob("??/*")) if DIGEST.fullmatch(path.name))

    def collect(self, limit_bytes: int) -> tuple[int, int]:
        """Remove the least recently used entries above `limit_bytes`, and what killed processes and versions left.

        Returns the number of entries that were removed and of bytes that are left.
        """
        removed, kept = 0, list(self.entries())
        readable = {entry.path for entry in kept}
        for path in [path for path in self.paths() if path not in readable]:
            removed += self.remove(path)
        for folder in (ASIDE, PARTIAL):
            for path in (self.root / folder).glob("*"):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        total = sum(entry.size_bytes for entry in kept)
        for entry in sorted(kept, key=lambda entry: entry.used):
            if total <= limit_bytes:
                break
            total -= entry.size_bytes
            removed += self.remove(entry.path)
        (self.root / ADDED).unlink(missing_ok=True)
        return removed, total

    def _path(self, key: Key) -> Path:
        digest = key.digest
        return self.root / key.kind / digest[:2] / digest

    def _drop(self, path: Path, key: Key, reason: str) -> None:
        say(f"store: the {key.spoken()} that was kept cannot be used: {reason}; it is computed again")
        try:
            self.remove(path)
        except OSError:
            self._is_writable = False

    def remove(self, path: Path) -> bool:
        """Out of the way in one step, so that nobody reads half of it."""
        aside = self.root / ASIDE / uuid.uuid4().hex
        aside.parent.mkdir(exist_ok=True, mode=0o700)
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was quicker
            return False
        shutil.rmtree(aside, ignore_errors=True)
        return True


def read(path: Path) -> Entry:
    """The entry in the folder `path`, without a look at its files. Raises Damaged, FileNotFoundError."""
    file = path / ENTRY
    text = file.read_bytes()
    if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
        raise Damaged("it belongs to another user")
    try:
        told, digest = json.loads(text), ""
        if told.get("format") != FORMAT:
            raise Damaged(f"it is of another version of optpipe (format {told.get('format')})")
        digest = told.pop("sha256")
        key = Key(told["kind"], told["key"])
        entry = Entry(key, told["content"], told["files"], told["size_bytes"], told["made"], path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged("its entry.json is damaged") from error
    if digest != hashlib.sha256(_canonical(told)).hexdigest():
        raise Damaged("its entry.json was changed")
    if key.digest != path.name:
        raise Damaged("it is another entry's")
    return entry


def check(entry: Entry) -> None:
    """Compare every file with its sha256. Raises Damaged."""
    found = {str(path.relative_to(entry.path / FILES)) for path in (entry.path / FILES).rglob("*") if path.is_file()}
    if found != set(entry.files):
        raise Damaged("files are missing, or there are more than it was kept with")
    for name, digest in entry.files.items():
        if _sha256(entry.path / FILES / name) != digest:
            raise Damaged(f"{name} was changed")


def _write(aside: Path, key: Key, content: dict[str, Any], files: Files) -> int:
    """The entry into `aside`; its size in bytes."""
    sums, size = {}, 0
    for name, source in sorted(files.items()):
        target = aside / FILES / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sums[name] = _copy(source, target)
        size += target.stat().st_size
    told = {
        "format": FORMAT, "kind": key.kind, "key": key.parts, "content": content, "files": sums, "size_bytes": size,
        "made": time.time(),
    }  # fmt: skip
    told = json.loads(json.dumps(told, default=_plain))  # as it will be read
    text = json.dumps({**told, "sha256": hashlib.sha256(_canonical(told)).hexdigest()}, indent=1)
    with (aside / ENTRY).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return size + len(text)


def _copy_checked(entry: Entry, into: Path) -> None:
    """Raises Damaged; nothing is left in `into` then."""
    written = []
    try:
        for name, digest in entry.files.items():
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written.append(target)
            if _copy(entry.path / FILES / name, target) != digest:
                raise Damaged(f"{name} was changed")
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path) -> str:
    """Sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    """A NumPy number as Python's, anything else in words."""
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)

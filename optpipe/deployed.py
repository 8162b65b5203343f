"""The deployed model of a finished run as a callable: `load`, a pool for parallel callers, a cache of results."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple

from optpipe import manifest
from optpipe.errors import OptpipeError, named_reason
from optpipe.forms import FORMS, form
from optpipe.runtimes import RUNTIMES, Runner, make_runner
from optpipe.signature import Input, Signature


class CacheInfo(NamedTuple):
    """As that of functools.lru_cache."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


class DeployedModel:
    """A deployed model as a callable: NumPy arrays in, by position or by name; one array or a list of them out.

    Inputs are checked against the manifest before each call; nothing is cast. It may be called from several threads.
    """

    def __init__(self, about: dict[str, Any], inputs: list[Input], runners: list[Runner], cache: int) -> None:
        runners = [_by_name(runner, inputs) for runner in runners]
        self.manifest = about
        self.workers = len(runners)
        self._checked = Signature(inputs).checked
        self._run: Runner = runners[0] if len(runners) == 1 else _Pool(runners)
        self._cache = _Cache(self._run, cache) if cache else None
        self._run = self._cache or self._run

    def __call__(self, /, *arrays: Any, **named: Any) -> Any:
        inputs = self._checked(arrays, named)
        try:
            outputs = self._run(*inputs)
        except OptpipeError:
            raise
        except Exception as error:  # each engine has errors of its own
            shapes = ", ".join(f"{array.dtype} {array.shape}" for array in inputs)
            raise OptpipeError(
                f"{self.manifest['runtime']} cannot run the model on {shapes}: {named_reason(error)}"
            ) from error
        return outputs[0] if len(outputs) == 1 else outputs

    def map(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The results of `batches` in order, computed by all workers, at most two batches a worker ahead.

        batches: each an array, a tuple of arrays or a dict of them.
        """
        ahead: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(self.workers) as threads:
            for batch in batches:
                ahead.append(threads.submit(self._call_on, batch))
                if len(ahead) > 2 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _call_on(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self(**batch)
        return self(*batch) if isinstance(batch, tuple) else self(batch)

    def cache_info(self) -> CacheInfo:
        """How often the cache had the result, and how many it holds; all zero without one."""
        return self._cache.info() if self._cache else CacheInfo(0, 0, 0, 0)

    def close(self) -> None:
        """Let go of sessions and cached results. Calls under way finish; later ones raise OptpipeError."""
        self._run, self._cache = _closed, None

    def __enter__(self) -> DeployedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    run_folder: str | os.PathLike[str], threads: int | None = None, *, workers: int = 1, cache: int | None = None
) -> DeployedModel:
    """The deployed model of the run in `run_folder`, ready to be called.

    threads: of one call; by default those of the run's target.
    workers: sessions that answer at the same time, each with `threads` threads and a copy of the weights.
    cache: how many results to keep, the least recently used go first; the same inputs are then not computed again.
    Raises OptpipeError if the folder holds no finished run, or a file is not the one that the run wrote. A model that
    was deployed as a torch module is unpickled: load only runs that you trust.
    """
    for name, value, least in (("threads", threads, 1), ("workers", workers, 1), ("cache", cache, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise OptpipeError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    found, folder = manifest.read(run_folder), Path(run_folder) / manifest.FOLDER
    _check_files(found, folder)
    try:
        inputs = [Input.read(entry) for entry in found["inputs"]]
        if not inputs:
            raise ValueError("it names no inputs")
        threads = threads or int(found["target"]["threads"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OptpipeError(
            f"{folder / manifest.FILE} cannot be read ({named_reason(error)}); run the recipe again"
        ) from None
    settings = threads, found["target"].get("device", "cpu"), found.get("options")
    # each from the files, so that workers share nothing
    try:
        runners = [make_runner(found["runtime"], form(found["form"]).load(folder), *settings) for _ in range(workers)]
    except OptpipeError:
        raise
    except Exception as error:  # of the engine that opens the file
        raise OptpipeError(f"{found['runtime']} cannot open the model in {folder}: {named_reason(error)}") from error
    return DeployedModel(found, inputs, runners, cache or 0)


def _check_files(found: dict[str, Any], folder: Path) -> None:
    """Raise OptpipeError unless the files are those that the run wrote, of a form that this optpipe knows."""
    file = folder / manifest.FILE
    if found["form"] not in FORMS or found["form"] not in RUNTIMES.get(found["runtime"], ()):
        raise OptpipeError(
            f"{file} names the form {found['form']!r} and the runtime {found['runtime']!r}, and this optpipe does not "
            "have both; load it with the version that wrote it"
        )
    for name, expected in found["files"].items():
        if not (folder / name).is_file() or manifest.facts(folder / name) != expected:
            raise OptpipeError(
                f"{folder / name} is missing or is not the file that the run wrote; run the recipe again"
            )
    for path in (*form(found["form"]).files(folder), *folder.glob("module.pt")):  # the latter is unpickled
        if path.name not in found["files"]:
            raise OptpipeError(f"{file} does not name {path.name}, so it cannot be checked; run the recipe again")


def _by_name(runner: Runner, inputs: list[Input]) -> Runner:
    """`runner`, called by position, for a model that takes the last of its inputs by name only."""
    names = [each.name for each in inputs if each.keyword]
    first = len(inputs) - len(names)
    if not names:
        return runner
    return lambda *arrays: runner(*arrays[:first], **dict(zip(names, arrays[first:], strict=True)))


def _closed(*arrays: Any) -> list[Any]:
    raise OptpipeError("this model was closed; load it again")


class _Pool:
    """Runners, of which each answers one call at a time; a call that finds none free waits."""

    def __init__(self, runners: list[Runner]) -> None:
        self._free = deque(runners)  # the last one used goes first: its weights are still in the processor's cache
        self._tokens: SimpleQueue[None] = SimpleQueue()  # as many as there are free runners
        for _ in runners:
            self._tokens.put(None)

    def __call__(self, *arrays: Any) -> list[Any]:
        self._tokens.get()
        runner = self._free.pop()
        try:
            return runner(*arrays)
        finally:
            self._free.append(runner)
            self._tokens.put(None)


class _Cache:
    """Results by the content of the inputs: type, shape and bytes; the least recently used leaves first.

    It keeps copies and gives copies, so that a caller who writes into a result spoils none, and may do so as without.
    """

    def __init__(self, run: Runner, size: int) -> None:
        self._run = run
        self._size = size
        self._results: OrderedDict[bytes, list[Any]] = OrderedDict()
        self._lock = Lock()
        self._hits = self._misses = 0

    def __call__(self, *arrays: Any) -> list[Any]:
        key = _digest(arrays)
        with self._lock:
            kept = self._results.get(key)
            if kept is None:
                self._misses += 1
            else:
                self._hits += 1
                self._results.move_to_end(key)
        if kept is not None:
            return [array.copy() for array in kept]
        outputs = self._run(*arrays)
        kept = [array.copy() for array in outputs]
        with self._lock:
            self._results[key] = kept
            if len(self._results) > self._size:
                self._results.popitem(last=False)
        return outputs

    def info(self) -> CacheInfo:
        with self._lock:
            return CacheInfo(self._hits, self._misses, self._size, len(self._results))


def _digest(arrays: Iterable[Any]) -> bytes:
    """What stands for `arrays`: 32 bytes, of which no two inputs that anybody has met share one."""
    digest = hashlib.blake2b(digest_size=32)
    for array in arrays:
        if array.dtype.hasobject:
            raise OptpipeError(f"the cache cannot tell inputs of dtype {array.dtype} apart; load the model without it")
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array)
    return digest.digest()

"""python -m optpipe.store: what is kept, why a result differs from another, whether all of it is whole.

    ls                      what is kept, the latest used last
    why RUN_A RUN_B         the first step whose results differ, and what they depend on that is not the same
    verify [--delete]       compare every file with its sha256; exit code 1 if one is damaged
    gc [--limit-gb 5]       remove the least recently used results, what killed processes left and other versions' ones

The folder is the user's own, or the one that --folder names, as store.folder does for a run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optpipe.errors import OptpipeError
from optpipe.machine import user_cache
from optpipe.report import figures
from optpipe.store import GIGABYTE, KEY_FILE, Damaged, Settings, Store, check, read, refusal

SHOWN = 60  # characters of a value


def main(words: Sequence[str] | None = None) -> int:
    """Do what `words` ask; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m optpipe.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of the store; by default in the user's cache folder")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="what is kept")
    compared = commands.add_parser("why", help="why two runs' results differ")
    compared.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    checked = commands.add_parser("verify", help="whether every file is as it was kept")
    checked.add_argument("--delete", action="store_true", help="remove what is damaged")
    collected = commands.add_parser("gc", help="remove what was not used for longest")
    collected.add_argument("--limit-gb", type=float, default=Settings().limit_gb, help="to be left at most")
    asked = parser.parse_args(words)
    try:
        if asked.command == "why":
            print(why(*asked.runs))
            return 0
        store = _store(asked.folder or user_cache() / "store")
        if asked.command == "ls":
            return ls(store)
        if asked.command == "verify":
            return verify(store, delete=asked.delete)
        return gc(store, asked.limit_gb)
    except OptpipeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _store(folder: Path) -> Store:
    if not folder.is_dir():
        raise OptpipeError(f"there is no store in {folder}; runs make one, or name another with --folder")
    if reason := refusal(folder):
        raise OptpipeError(reason)
    return Store(folder, Settings().limit_gb)


def ls(store: Store) -> int:
    """A row for each entry."""
    from rich.box import SIMPLE
    from rich.table import Table

    from optpipe.report import console

    view = Table(box=SIMPLE, pad_edge=False)
    for column in ("sha256", "kind", "of", "KB", "computed in", "used"):
        view.add_column(column, no_wrap=True, justify="right" if column in ("KB", "computed in") else "left")
    entries = sorted(store.entries(), key=lambda entry: entry.used)
    for entry in entries:
        seconds = entry.content.get("seconds")
        view.add_row(
            entry.path.name[:12], entry.key.kind, str(entry.key.parts.get("stage", "")),
            f"{entry.size_bytes / 1000:.1f}", figures.seconds(seconds) if seconds is not None else "",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
        )  # fmt: skip
    console.show(view)
    total = sum(entry.size_bytes for entry in entries)
    print(f"{len(entries)} results, {figures.size(total)}, in {store.root}")
    return 0


def verify(store: Store, *, delete: bool) -> int:
    """Look at every file."""
    count, damaged = 0, []
    for path in store.paths():
        count += 1
        try:
            check(read(path))
        except (Damaged, OSError) as error:
            damaged.append(path)
            print(f"{path}: {error}")
            if delete:
                store.remove(path)
    done = "removed" if delete else "computed again by the run that needs them"
    print(f"{count} results, {len(damaged)} damaged{f', {done}' if damaged else ''}")
    return int(bool(damaged) and not delete)


def gc(store: Store, limit_gb: float) -> int:
    """Make room."""
    if not 0 <= limit_gb < math.inf:
        raise OptpipeError(f"--limit-gb is {limit_gb:g}; it must be at least 0")
    removed, left = store.collect(int(limit_gb * GIGABYTE))
    print(f"{removed} results removed, {figures.size(left)} left in {store.root}")
    return 0


def why(first: Path, second: Path) -> str:
    """The first step of two runs whose results do not depend on the same, and what differs, in words."""
    ours, theirs = _keys(first), _keys(second)
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in ours or name not in theirs:
            return f"step '{name}' is only in {first if name in ours else second}"
        if different := _differences(ours[name], theirs[name]):
            shown = "".join(f"\n  {where}: {_short(a)} / {_short(b)}" for where, a, b in different)
            return f"step '{name}' is the first to differ, by{shown}"
    return "every step depends on the same: their results are one"


def _keys(run: Path) -> dict[str, dict[str, Any]]:
    """What each step of a run depends on, by the name of its folder."""
    found = {str(path.parent.relative_to(run)): path for path in sorted(run.rglob(KEY_FILE))}
    if not found:
        what = "holds no step whose result can be identified" if run.is_dir() else "is no folder"
        raise OptpipeError(f"{run} {what}; name the folder of a run, for example outputs/runs/<time>")
    try:
        return {name: json.loads(path.read_text()) for name, path in found.items()}
    except ValueError as error:
        raise OptpipeError(f"{run} holds a {KEY_FILE} that cannot be read ({error})") from None


def _differences(a: Any, b: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        parts = dict.fromkeys([*a, *b])
        return [
            found
            for part in parts
            for found in _differences(a.get(part), b.get(part), f"{where}, {part}" if where else part)
        ]
    return [] if a == b else [(where, a, b)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


if __name__ == "__main__":
    sys.exit(main())

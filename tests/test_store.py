"""The store alone: what is kept comes back whole, once, and what cannot be trusted does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optpipe.store import ENTRY, FILES, GIGABYTE, Key, NoStore, Settings, Store, open_store
from optpipe.store.__main__ import main

KEY = Key("step", {"stage": "prune/channels", "seed": 1})
OTHER = Key("step", {"stage": "prune/channels", "seed": 2})
CONTENT = {"hash": "abc", "seconds": 1.5, "notes": ["two words"]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    return Store(folder, limit_gb=1.0)


def keep(store: Store, key: Key, tmp_path: Path, text: str = "weights") -> Path:
    """The entry's folder."""
    file = tmp_path / "module.pt"
    file.write_text(text * 100)
    store.put(key, CONTENT, {"inner/module.pt": file})
    return store.root / key.kind / key.digest[:2] / key.digest


def test_what_is_kept_comes_back(store: Store, tmp_path: Path) -> None:
    assert store.get(KEY) is None
    keep(store, KEY, tmp_path)
    assert store.get(KEY, tmp_path / "into") == CONTENT
    assert (tmp_path / "into" / "inner" / "module.pt").read_text() == "weights" * 100
    assert store.get(OTHER) is None


def flipped(entry: Path) -> None:
    path = entry / FILES / "inner" / "module.pt"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def truncated(entry: Path) -> None:
    path = entry / FILES / "inner" / "module.pt"
    path.write_bytes(path.read_bytes()[:-1])


def removed(entry: Path) -> None:
    (entry / FILES / "inner" / "module.pt").unlink()


def of_another_version(entry: Path) -> None:
    told = json.loads((entry / ENTRY).read_text())
    (entry / ENTRY).write_text(json.dumps({**told, "format": 0}))


def reworded(entry: Path) -> None:
    (entry / ENTRY).write_text((entry / ENTRY).read_text().replace("two words", "too words"))


def cut(entry: Path) -> None:
    (entry / ENTRY).write_text((entry / ENTRY).read_text()[:-20])


DAMAGES = [flipped, truncated, removed, of_another_version, reworded, cut]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_was_changed_is_found_and_not_used(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    entry = keep(store, KEY, tmp_path)
    damage(entry)
    assert store.get(KEY, tmp_path / "into") is None
    assert not entry.exists() and not list((tmp_path / "into").rglob("*.pt"))
    assert "step prune/channels that was kept cannot be used" in capsys.readouterr().err
    keep(store, KEY, tmp_path)
    assert store.get(KEY, tmp_path / "into") == CONTENT


def test_swapped_entries_are_found(store: Store, tmp_path: Path) -> None:
    one, two = keep(store, KEY, tmp_path, "one"), keep(store, OTHER, tmp_path, "two")
    for file in (ENTRY, f"{FILES}/inner/module.pt"):
        for a, b in ((one / file, tmp_path / "aside"), (two / file, one / file), (tmp_path / "aside", two / file)):
            a.rename(b)
    assert store.get(KEY, tmp_path / "into") is None and store.get(OTHER, tmp_path / "into") is None


def test_the_least_recently_used_goes_first(store: Store, tmp_path: Path) -> None:
    entries = [keep(store, Key("step", {"seed": seed}), tmp_path, "x" * 1000) for seed in range(3)]
    for age, entry in zip((30, 20, 10), entries, strict=True):
        os.utime(entry / ENTRY, (time.time() - age, time.time() - age))
    store.get(Key("step", {"seed": 0}))  # used just now
    removed, left = store.collect(2 * 10**5 + 5000)
    assert removed == 1 and [entry.exists() for entry in entries] == [True, False, True]
    assert left <= 2 * 10**5 + 5000


def test_a_clock_that_was_wrong_makes_nothing_immortal(store: Store, tmp_path: Path) -> None:
    entry = keep(store, KEY, tmp_path)
    os.utime(entry / ENTRY, (time.time() + 10**7, time.time() + 10**7))
    (found,) = store.entries()
    assert found.used <= time.time()
    assert store.collect(0)[0] == 1 and not entry.exists()


def test_the_limit_is_kept_once_enough_was_added(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o700)
    store = Store(tmp_path / "store", limit_gb=1e5 / GIGABYTE)
    for seed in range(5):
        keep(store, Key("step", {"seed": seed}), tmp_path, "x" * 500)
    store.close()
    assert 0 < len(list(store.entries())) < 5


ONE = """
import sys, time
from pathlib import Path
from optpipe.store import Key, Store
store, key = Store(Path(sys.argv[1]), 1.0), Key("step", {"stage": "prune/channels"})
with store.alone(key):
    if store.get(key) is None:
        with open(sys.argv[2], "a") as computed:
            computed.write("once ")
        time.sleep(1.0)
        store.put(key, {})
"""


def test_processes_that_need_the_same_compute_it_once(store: Store, tmp_path: Path) -> None:
    computed = tmp_path / "computed"
    command = [sys.executable, "-c", ONE, str(store.root), str(computed)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert computed.read_text() == "once "
    assert any("waiting for another run that computes the same step prune/channels" in text for text in said)


FULL = """
import resource, signal, sys
from pathlib import Path
from optpipe.store import Key, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = Store(Path(sys.argv[1]), 1.0)
store.put(Key("step", {"seed": 1}), {}, {"large": Path(sys.argv[2])})
store.put(Key("step", {"seed": 2}), {})
print(len(list(store.entries())), len(list((store.root / "aside").iterdir())))
"""


def test_where_nothing_can_be_written_the_run_goes_on(store: Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * 100_000)
    command = [sys.executable, "-c", FULL, str(store.root), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written to (File too large); from here on nothing is kept") == 1
    assert done.stdout == "0 0\n"


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    assert isinstance(open_store(Settings(folder=str(folder))), NoStore)
    said = capsys.readouterr().err
    assert "others may write to" in said and "chmod go-w" in said and "goes on without one" in said


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert isinstance(open_store(Settings(folder=str(tmp_path / "file"))), NoStore)
    assert "store.folder=" in capsys.readouterr().err


def test_the_store_is_its_owners_alone(tmp_path: Path) -> None:
    store = open_store(Settings(folder=str(tmp_path / "new")))
    assert isinstance(store, Store)
    entry = keep(store, KEY, tmp_path)
    modes = [path.stat().st_mode & 0o077 for path in (store.root, entry)]
    assert modes == [0, 0]


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="limit_gb is 0; it must be above 0, or do without: store=none"):
        Settings(limit_gb=0)


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def test_the_command_lists_checks_and_makes_room(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = keep(store, KEY, tmp_path)
    assert run("--folder", store.root, "ls") == 0
    assert "prune/channels" in (said := capsys.readouterr().out) and "1 results" in said
    assert run("--folder", store.root, "verify") == 0
    flipped(entry)
    assert run("--folder", store.root, "verify") == 1
    assert "module.pt was changed" in capsys.readouterr().out
    assert run("--folder", store.root, "verify", "--delete") == 0 and not entry.exists()
    keep(store, KEY, tmp_path)
    assert run("--folder", store.root, "gc", "--limit-gb", "nan") == 1
    assert run("--folder", store.root, "gc", "--limit-gb", 0) == 0
    assert "1 results removed, 0 bytes left" in capsys.readouterr().out
    assert run("--folder", tmp_path / "none", "ls") == 1
    assert "there is no store in" in capsys.readouterr().err
    assert run("why", tmp_path, tmp_path) == 1
    assert "holds no step whose result can be identified" in capsys.readouterr().err

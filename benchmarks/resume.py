"""Runs that are killed, runs at once, and a store that was damaged: is the result the same, and computed once?

    python benchmarks/resume.py                 # 20 kills, 4 processes, 20 damaged files; about 40 min on 2 cores
    python benchmarks/resume.py --kills 3

Each kill: an empty store, `kill -9` at a random moment of a step (of the one that was hit least, beginning with what
comes before the first), then the same command again. Ends with 1 if an artifact differs from the undisturbed run's, a
step was never hit, a stage is computed twice by runs at once, or damage is not found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("+recipe=edge_int8", "measure=quick", "measure.noise_limit=1000", "tracking=none", "distill.epochs=3")
BEFORE = "before the first step"
DAMAGES = ("truncated", "flipped", "swapped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        finished(start(root / "warm", root / "store_warm"))  # the reference network's weights
        begun = timeline(start(root / "whole", root / "store_whole"), root / "whole")
        expected = artifact(root / "whole")
        print(f"undisturbed: {sum(begun.values()):.0f} s, {expected[:12]}", flush=True)
        good = kills(root, asked.kills, begun, expected, draw)
        good &= at_once(root, asked.processes, expected)
        good &= damaged(root, asked.damages, expected, draw)
    return int(not good)


def start(folder: Path, store: Path) -> subprocess.Popen[str]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "optpipe", *WORDS, f"store.folder={store}", f"hydra.run.dir={folder}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed. Ends this program where it failed."""
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}:\n{said}")
    return said


def artifact(folder: Path) -> str:
    """Sha256 of the deployed file."""
    files: dict[str, Any] = json.loads((folder / "model" / "manifest.json").read_text())["files"]
    return str(files["model.onnx"]["sha256"])


def stages(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["stages"]
    return found


def timeline(process: subprocess.Popen[str], folder: Path) -> dict[str, float]:
    """Seconds that a run spends in each step, by its folder, until the next one's appears."""
    seconds, here, since = {}, BEFORE, time.monotonic()
    while process.poll() is None:
        if (now := step_of(folder)) != here:
            seconds[here], here, since = time.monotonic() - since, now, time.monotonic()
        time.sleep(0.005)
    finished(process)
    return {**seconds, here: time.monotonic() - since}


def step_of(folder: Path) -> str:
    """Where a run is: the rehearsal's folder is removed after it, the baseline's is made before it."""
    if (folder / "00_rehearsal").is_dir():
        return "00_rehearsal"
    return max((path.name for path in folder.glob("[0-9]*_*")), default=BEFORE)


def first_seen(aim: str) -> set[str]:
    """What a run has been through when it works on `aim`: the baseline is measured after the rehearsal."""
    return {"00_rehearsal"} if aim == "00_baseline" else set()


def kills(root: Path, count: int, seconds: dict[str, float], expected: str, draw: random.Random) -> bool:
    """seconds: of an undisturbed run, in each step."""
    hit: Counter[str] = Counter()
    wrong, seconds = 0, dict(seconds)
    for number in range(3 * count):  # some come too late
        if hit.total() == count:
            break
        folder, store, aim = root / f"killed_{number}", root / f"store_{number}", min(seconds, key=hit.__getitem__)
        process, seen = start(folder, store), {BEFORE}
        while process.poll() is None and (step_of(folder) != aim or not seen >= first_seen(aim)):
            seen.add(step_of(folder))
            time.sleep(0.002)
        time.sleep(seconds[aim] * draw.random())
        was_over, where = process.poll() is not None, step_of(folder)
        if not was_over:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if where != aim:
            seconds[aim] /= 2  # less else runs on this machine than when the undisturbed run was timed
        was_over |= (folder / "report.json").exists()
        if not was_over:
            hit[where] += 1
            finished(start(folder, store))
        wrong += artifact(folder) != expected
        reused = [stage["key"] for stage in stages(folder) if stage["cached"]]
        how = f"over before its moment in {aim} came" if was_over else f"killed in {where}"
        print(f"{how}: {artifact(folder)[:12]}, reused {', '.join(reused) or 'nothing'}", flush=True)
        for path in (folder, store):
            shutil.rmtree(path, ignore_errors=True)
    missed = [step for step in seconds if not hit[step]]
    print(f"{hit.total()} of {count} killed, in {dict(hit)}, not in {missed}; {wrong} ended with another artifact")
    return not wrong and hit.total() == count and (not missed or count < 2 * len(seconds))


def at_once(root: Path, count: int, expected: str) -> bool:
    """Identical runs, started together with an empty store."""
    folders = [root / f"at_once_{number}" for number in range(count)]
    for process in [start(folder, root / "store_at_once") for folder in folders]:
        finished(process)
    computed = Counter(stage["key"] for folder in folders for stage in stages(folder) if not stage["cached"])
    same = sum(artifact(folder) == expected for folder in folders)
    print(
        f"{count} at once: {same} with that artifact; times that each stage was computed: {dict(computed)}", flush=True
    )
    return same == count and set(computed.values()) == {1}


def damaged(root: Path, count: int, expected: str, draw: random.Random) -> bool:
    """Files of the undisturbed run's store, each damaged alone; every entry is then read by a run."""
    found = right = 0
    files = sorted(path for path in (root / "store_whole" / "step").rglob("files/*") if path.is_file())
    for number in range(count):
        store, folder = root / "store_damaged", root / f"damaged_{number}"
        shutil.copytree(root / "store_whole", store)
        how, file = DAMAGES[number % len(DAMAGES)], store / draw.choice(files).relative_to(root / "store_whole")
        damage(file, how, [store / path.relative_to(root / "store_whole") for path in files], draw)
        said = finished(start(folder, store))
        found += "that was kept cannot be used" in said
        right += artifact(folder) == expected
        shutil.rmtree(store)
        shutil.rmtree(folder)
    print(f"damaged files: {found} of {count} found, {right} runs ended with that artifact", flush=True)
    return found == right == count


def damage(file: Path, how: str, others: Sequence[Path], draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if how == "swapped":
        other = draw.choice([path for path in others if path.read_bytes() != bytes(data)])
        file.write_bytes(other.read_bytes())
        other.write_bytes(bytes(data))
    elif how == "truncated":
        file.write_bytes(bytes(data[: draw.randrange(len(data))]))
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(data))


if __name__ == "__main__":
    sys.exit(main())

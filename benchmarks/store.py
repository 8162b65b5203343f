"""What the store costs: its share of a run, and a look-up among many entries.

    python benchmarks/store.py                  # about 5 min on 2 cores
    python benchmarks/store.py --entries 1000 --runs 2

Ends with 1 if the store takes more than 3 % of a run that computes everything, or a look-up among 10 000 entries more
than 10 ms.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from optpipe.store import Key, Store

SHARE, LOOK_UP_MS = 0.03, 10.0
WORDS = ("+recipe=edge_int8", "measure=quick", "measure.noise_limit=1000", "tracking=none", "distill.epochs=3")
# Times everything that a run asks of its store, in the run itself.
TIMED = """
import sys, time
from optpipe import reuse, store
spent = 0.0
def timed(function):
    def call(*args, **kwargs):
        global spent
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent += time.perf_counter() - begin
    return call
for name in ("get", "put", "close", "done", "partial"):
    setattr(store.Store, name, timed(getattr(store.Store, name)))
for name in ("begin", "step", "_key", "_timed"):
    setattr(reuse.Reuse, name, timed(getattr(reuse.Reuse, name)))
from optpipe.__main__ import main
begin = time.perf_counter()
try:
    main()
finally:
    print(f"SHARE {spent:.3f} {time.perf_counter() - begin:.3f}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        slowest = look_up(Path(name) / "many", asked.entries)
        shares = [share(Path(name), number) for number in range(asked.runs)]
    print(f"the store's share of a run: {', '.join(f'{value:.1%}' for value in shares)}")
    return int(statistics.median(shares) > SHARE or slowest > LOOK_UP_MS)


def look_up(root: Path, count: int) -> float:
    """Milliseconds of the slowest of many, hit or miss."""
    root.mkdir(mode=0o700)
    store, file = Store(root, limit_gb=10.0), root.parent / "file"
    file.write_bytes(b"x" * 1000)
    keys = [Key("step", {"stage": "prune/channels", "seed": seed}) for seed in range(count)]
    for key in keys:
        store.put(key, {"seconds": 1.0}, {"module.pt": file})
    times = []
    for key in [*keys[:: max(1, count // 500)], *(Key("step", {"seed": -seed}) for seed in range(500))]:
        begin = time.perf_counter()
        store.get(key)
        times.append(1000 * (time.perf_counter() - begin))
    begin = time.perf_counter()
    total = sum(1 for _ in store.entries())
    whole = time.perf_counter() - begin
    print(
        f"look-up among {total} entries: median {statistics.median(times):.2f} ms, slowest {max(times):.2f} ms; "
        f"all of them read in {whole:.1f} s"
    )
    return max(times)


def share(root: Path, number: int) -> float:
    """Of a run with an empty store."""
    command = [sys.executable, "-c", TIMED, *WORDS, f"store.folder={root / f'store_{number}'}"]
    command += [f"hydra.run.dir={root / f'run_{number}'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("SHARE")), None)
    if done.returncode or line is None:
        sys.exit(f"a run ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    spent, whole = map(float, line.split()[1:])
    print(f"run {number + 1}: {spent:.2f} s of {whole:.1f} s in the store and its keys", flush=True)
    return spent / whole


if __name__ == "__main__":
    sys.exit(main())

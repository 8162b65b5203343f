"""A sweep of twelve runs: what it costs beside the work that its jobs do not share, alone and two at once.

    python benchmarks/sweep.py                     # everything; over an hour on 2 cores
    python benchmarks/sweep.py --only cold,again   # a quarter of an hour
    python benchmarks/sweep.py --short             # half the epochs and quick figures: the rest weighs more

Five sweeps of 3 pruning ratios × 4 quantisers of the recipe as it is: with an empty store, the same again, with an
empty store but without rehearsals, two jobs at once with an empty store, and without a store. Ends with 1 if one of the
first and the third costs more than 1.15 times the work of its distinct steps plus measuring, a step is computed twice,
or the second computes something or takes more than 2.5 s a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COST, SECONDS_A_RUN = 1.15, 2.5
WORDS = (
    "--multirun", "+recipe=edge_int8", "prune.ratio=0.5,0.6,0.7", "quantize=static,dynamic,mixed,qat", "tracking=none",
    "measure.noise_limit=1000",  # a figure that a busy minute spoilt would be measured again
)  # fmt: skip
SHORT = ("distill.epochs=5", "measure=quick")
SWEEPS = {
    "cold": ("store.folder={root}/alone",),
    "again": ("store.folder={root}/alone",),
    "unrehearsed": ("store.folder={root}/unrehearsed", "rehearse=false"),
    "parallel": ("store.folder={root}/parallel", "hydra/launcher=parallel"),
    "off": ("store=none",),
}


@dataclass(frozen=True)
class Swept:
    """What one sweep took."""

    seconds: float
    reports: list[dict[str, Any]]

    @property
    def computed(self) -> Counter[str]:
        """How often each result was computed, by its key in the store; without one, by what it is made of and gives."""
        found: Counter[str] = Counter()
        for report in self.reports:
            before = ""
            for stage in report["stages"]:
                key = stage["store_key"] or f"{stage['stage']} {before} {stage['model_sha256']}"
                before = stage["model_sha256"]
                found[key] += not stage["cached"]
        return +found

    @property
    def work(self) -> float:
        """Seconds of the stages that were computed."""
        return sum(stage["seconds"] for stage in self._stages() if not stage["cached"])

    @property
    def measuring(self) -> float:
        return sum(report["measuring_seconds"] for report in self.reports)

    @property
    def other(self) -> str:
        """What the rest is, as far as the reports say."""
        parts = {name: sum(r[f"{name}_seconds"] for r in self.reports) for name in ("model", "rehearsal", "overhead")}
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())

    def _stages(self) -> list[dict[str, Any]]:
        return [stage for report in self.reports for stage in report["stages"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SWEEPS), help="comma-separated, in this order")
    parser.add_argument("--short", action="store_true", help=" ".join(SHORT))
    arguments = parser.parse_args()
    asked, words = arguments.only.split(","), (*WORDS, *(SHORT if arguments.short else ()))
    good, found = True, {}
    print("| sweep | seconds | of stages | measuring | the rest | results computed | twice |\n|" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as name:
        for sweep in asked:
            found[sweep] = swept = run(sweep, words, Path(name))
            twice = sum(count > 1 for count in swept.computed.values())
            print(
                f"| {sweep} | {swept.seconds:.0f} | {swept.work:.0f} | {swept.measuring:.0f} | {swept.other} | "
                f"{sum(swept.computed.values())} | {twice} |",
                flush=True,
            )
            good &= sweep == "off" or not twice
    for name in {"cold", "unrehearsed"} & set(found):
        swept = found[name]
        ratio = swept.seconds / (swept.work + swept.measuring)
        print(f"'{name}' took {ratio:.2f} times its distinct work and measuring; at most {COST} is asked")
        good &= ratio <= COST
    if again := found.get("again"):
        each = again.seconds / len(again.reports)
        print(f"again: {sum(again.computed.values())} computed, {each:.2f} s a run; at most {SECONDS_A_RUN} is asked")
        good &= not again.computed and each <= SECONDS_A_RUN
    return int(not good)


def run(name: str, words: tuple[str, ...], root: Path) -> Swept:
    """Ends this program where a job fails."""
    folder = root / name
    words = (*words, *(word.format(root=root) for word in SWEEPS[name]), f"hydra.sweep.dir={folder}")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "optpipe", *words], capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        sys.exit(f"the sweep '{name}' ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Swept(seconds, [json.loads(path.read_text()) for path in sorted(folder.glob("*/report.json"))])


if __name__ == "__main__":
    sys.exit(main())

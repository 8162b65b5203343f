"""What each policy does where a recipe really breaks its budget: `python benchmarks/policies.py` (about 3 minutes).

edge_int8 with nine of ten channels removed and one epoch of distillation loses far more than the two points that the
budget allows. Nothing is mocked: every row is a run of the command line in a folder of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

BREAKS = ("prune.ratio=0.9", "prune.round_to=8", "distill.epochs=1", "budget.quality_drop=0.02")
RUNS = {
    "warn": (),
    "stop": (),
    "rollback": (),
    "relax": ("relax={distill: [{epochs: 2}, {epochs: 12}], prune: [{ratio: 0.5}]}",),
}


def main() -> int:
    print("| policy | exit code | status | steps | validation drop, points | final test accuracy |\n|" + " --- |" * 6)
    kept = {}
    for policy, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            overrides = [*BREAKS, f"budget.policy={policy}", *words, "measure=quick", "tracking=none", "store=none"]
            command = [sys.executable, "-m", "optpipe", "+recipe=edge_int8", *overrides, f"hydra.run.dir={folder}/run"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            report = json.loads((Path(folder) / "run" / "report.json").read_text())
        kept[policy] = done.returncode, report
        print(row(policy, done.returncode, report), flush=True)
        for stage in report["stages"]:
            for attempt in stage["attempts"]:
                print(f"|  | | | {stage['key']} {attempt['method']}: {attempt['ok']} | {attempt['reason']} | |")
    inside = all(kept[policy][0] == 0 and kept[policy][1]["status"] == "ok" for policy in ("rollback", "relax"))
    broken = kept["warn"][1]["status"] == kept["stop"][1]["status"] == "over_budget"
    return 0 if inside and broken and kept["warn"][0] == 0 and kept["stop"][0] == 1 else 1


def row(policy: str, code: int, report: dict) -> str:
    """A line of the table."""
    steps = ", ".join(f"{stage['key']} {stage['status']}" for stage in report["stages"] if stage["status"] != "ok")
    drops = [check for check in report["budget"]["checks"] if check["limit"] == "quality_drop"]
    final = report["final"].get("measurement")
    accuracy = f"{final['quality']['value']:.2%}" if final else "none"
    cells = (policy, str(code), report["status"], steps or "all ok", f"{drops[-1]['value'] * 100:.2f}", accuracy)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())

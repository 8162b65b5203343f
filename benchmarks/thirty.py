"""Networks of many kinds, each through simplify, trace/program and export/onnx, with the parity of the file.

    python benchmarks/thirty.py [--only NAME …] [--output FILE]

Prints a Markdown table and the count, and ends with 1 if a network is neither exported with parity nor refused with the
line of its source that says why. The networks are those of tests/thirty.py, with random weights; those of
`transformers` are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from thirty import NETWORKS, TRANSFORMERS, Carried, Network, carry

from optpipe.progress import say


def main() -> None:
    known = {**NETWORKS, **(TRANSFORMERS if importlib.util.find_spec("transformers") else {})}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.only:
        say(f"{name} …")
        with tempfile.TemporaryDirectory() as folder:
            rows.append(carry(name, Path(folder)))
    text = report(rows, known)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    sys.exit(any(not is_honest(row, known[row.name]) for row in rows))


def is_honest(row: Carried, network: Network) -> bool:
    """Whether it is exported, or refused with the line that is known to be why."""
    return row.is_exported or bool(network.line and network.line in row.reasons[0])


def report(rows: list[Carried], known: dict[str, Network]) -> str:
    lines = ["| network | what | captured by | operators | parity: largest difference | CPU s |", "|" + " --- |" * 6]
    lines += [
        f"| {row.name} | {known[row.name].what} | {row.way or 'nothing'} | {row.operators or '–'} | "
        f"{row.parity or '–'} | {row.seconds:.1f} |"
        for row in rows
    ]
    exported = sum(row.is_exported for row in rows)
    named = sum(not row.is_exported and is_honest(row, known[row.name]) for row in rows)
    lines += ["", f"{exported} of {len(rows)} exported with parity; {named} refused with the line of their source.", ""]
    lines += [f"- {row.name}: {reason}" for row in rows for reason in row.reasons]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

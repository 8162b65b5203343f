"""Sweeps on a Ray cluster of two nodes: a killed worker, Ctrl-C, a lost machine. Is every job done, and nothing twice?

    python benchmarks/ray_cluster.py            # 10 min on 2 cores; needs optpipe[ray]

Starts two Ray nodes of one core each on this machine, and somebody's project (tests/outside: a plug-in, a --config-dir,
all by relative paths) in a folder that the nodes were not started in. A sweep of six jobs, of which one is killed
(SIGKILL) while it works; a sweep that is interrupted, then given again; a sweep that loses one of both nodes. Ends with
1 if a job is not done, a stage was computed twice, a node stood idle, or a process is left over.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

OUTSIDE = Path(__file__).parents[1] / "tests" / "outside"
KNOWN = '''"""The outside project's task, with a fingerprint: without one nothing is shared."""
import dataclasses

import my_network


def pixels():
    return dataclasses.replace(my_network.pixels(), fingerprint="digits")
'''
WORDS = (
    "--multirun", "+recipe=clip_int8", "--config-dir", "my_conf", "data.factory=known.pixels", "tracking=none",
    "measure=quick", "measure.noise_limit=1000", "measure.previews=false", "rehearse=false",
    "pipeline=[simplify,clip,quantize,trace,export]", "hydra/launcher=ray",
)  # fmt: skip
UNTIL_SECONDS = 600.0


@dataclass
class Cluster:
    """Two nodes: `ray start --block`, and the processes below it."""

    address: str
    env: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def node_of(self, pid: int) -> int:
        """The number of the node that the worker `pid` belongs to."""
        above = [process.pid for process in psutil.Process(pid).parents()]
        return next(number for number, node in enumerate(self.nodes) if node.pid in above)

    def lose(self, number: int) -> None:
        """End a node as when its machine loses power."""
        top = psutil.Process(self.nodes[number].pid)
        for process in [top, *top.children(recursive=True)]:
            killed(process)


@dataclass
class Seen:
    """What was seen of a sweep while it ran: by job, the workers that ran it and the nodes of these."""

    pids: dict[int, list[int]] = field(default_factory=dict)
    nodes: dict[int, list[int]] = field(default_factory=dict)
    processes: list[psutil.Process] = field(default_factory=list)  # that jobs started


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what `… &` starts ignores it, and so would its sweeps
    # Ray's sockets must have short paths
    with tempfile.TemporaryDirectory(prefix="op", ignore_cleanup_errors=True) as name, cluster(Path(name)) as ray:
        project = prepared(Path(name))
        good = loses_a_worker(project, ray)
        good &= is_interrupted(project, ray)
        good &= loses_a_machine(project, ray)
    return int(not good)


def loses_a_worker(project: Path, ray: Cluster) -> bool:
    print("a sweep of six jobs, one killed while it works", flush=True)
    folder, seen, shot = project / "worker", Seen(), []

    def kill(number: int, pid: int) -> None:
        if not shot and list((folder / str(number)).glob("*_quantize")):
            os.kill(pid, signal.SIGKILL)
            shot.append((number, pid))

    code, out = finished(
        start(project, ray, folder, "clip.limit=0.05,0.1", "quantize=qat,static,dynamic"), ray, seen, folder, kill
    )
    good = told(folder, seen, code, out, jobs=6)
    number, pid = shot[0] if shot else (-1, 0)
    again = seen.pids.get(number, [])
    good &= check(f"job {number} was killed in process {pid} and done by {again[1:]}", len(again) == 2)
    good &= check("both nodes ran jobs", {node for nodes in seen.nodes.values() for node in nodes} == {0, 1})
    return good


def is_interrupted(project: Path, ray: Cluster) -> bool:
    print("\na sweep of four jobs, interrupted by Ctrl-C, then the same command", flush=True)
    folder, words = project / "interrupted", ("clip.limit=0.06,0.12", "quantize=qat,static")
    process, seen, sent = start(project, ray, folder, *words), Seen(), []

    def interrupt(number: int, _: int) -> None:
        if not sent and list((folder / str(number)).glob("*_quantize")):
            process.send_signal(signal.SIGINT)
            sent.append(number)

    code, out = finished(process, ray, seen, folder, interrupt)
    states = Counter(read["state"] for read in ledger(folder))
    good = check(f"exit code {code}, no traceback", code == 130 and "Traceback" not in out)
    good &= check(f"no job is left running ({dict(states)})", not states["running"] and not alive(seen))
    seen = Seen()
    code, out = finished(start(project, ray, folder, *words), ray, seen, folder)
    return told(folder, seen, code, out, jobs=4) and good


def loses_a_machine(project: Path, ray: Cluster) -> bool:
    print("\na sweep of four jobs, the second node killed while it works", flush=True)
    folder, seen, lost = project / "machine", Seen(), []

    def kill(number: int, pid: int) -> None:
        if not lost and seen.nodes[number] == [1] and list((folder / str(number)).glob("*_quantize")):
            ray.lose(1)
            lost.append(number)

    code, out = finished(
        start(project, ray, folder, "clip.limit=0.07,0.14", "quantize=qat,static"), ray, seen, folder, kill
    )
    good = told(folder, seen, code, out, jobs=4)
    number = lost[0] if lost else -1
    return check(f"job {number} was begun on node 1 and done on node 0", seen.nodes.get(number) == [1, 0]) and good


def told(folder: Path, seen: Seen, code: int, out: str, *, jobs: int) -> bool:
    """Print the sweep's jobs; whether all are done, with every result computed once and no process left."""
    print("| job | settings | state | s | nodes |\n|" + " --- |" * 5)
    for read in ledger(folder):
        own = " ".join(word for word in read["overrides"] if word.startswith(("clip.", "quantize=")))
        nodes = ", ".join(map(str, seen.nodes.get(read["number"], [])))
        print(f"| {read['number']} | {own} | {read['state']} | {read['seconds']:.0f} | {nodes} |")
    done = [read["number"] for read in ledger(folder) if read["state"] == "done"]
    stages = [
        stage for path in sorted(folder.glob("*/report.json")) for stage in json.loads(path.read_text())["stages"]
    ]
    computed = Counter(stage["store_key"] for stage in stages if not stage["cached"])
    twice = sum(count > 1 for count in computed.values())
    shared = len(stages) - sum(computed.values())
    print("\n".join(f"    {line}" for line in out.splitlines() if "begin again" in line))
    good = check(f"exit code {code}, {len(done)} of {jobs} jobs done", not code and len(done) == jobs)
    said = f"{len(stages)} steps: {len(computed)} results computed once, {twice} twice, {shared} shared"
    good &= check(said, not twice and "" not in computed and shared > 0)
    good &= check("no process of a job is left", not alive(seen))
    if not good:
        print(out)
    return good


def check(said: str, good: bool) -> bool:
    print(f"{'ok' if good else 'NOT OK'}: {said}", flush=True)
    return good


def prepared(root: Path) -> Path:
    """Somebody's project, with weights."""
    project = root / "project"
    shutil.copytree(OUTSIDE, project, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "known.py").write_text(KNOWN)
    train = "import pathlib, my_network; my_network.train(pathlib.Path('my_weights.safetensors'))"
    subprocess.run([sys.executable, "-c", train], cwd=project, check=True)
    return project


@contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Two nodes of one core on this machine; their process groups are ended, and nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # nobody else may run code here
    found = Cluster(
        f"127.0.0.1:{port}", {**os.environ, **token, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    )
    head = ("--head", f"--port={port}", f"--temp-dir={root / 'ray'}", "--include-dashboard=false")
    try:
        for words in (head, (f"--address={found.address}",)):
            found.nodes.append(node(root / f"node{len(found.nodes)}", found.env, *words))
        yield found
    finally:
        for number in range(len(found.nodes)):
            if found.nodes[number].poll() is None:
                found.lose(number)
            found.nodes[number].wait()


def node(folder: Path, env: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
    """`ray start …` in a folder and a process group of its own. Ends this program if it does not come up."""
    folder.mkdir()
    own = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, *own]
    log = folder / "ray.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    wait_for(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, 120)
    if process.poll() is not None or "Ray runtime started" not in log.read_text():
        process.kill()
        sys.exit(f"a Ray node did not start:\n{log.read_text()}")
    return process


def killed(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        pass


def start(project: Path, ray: Cluster, folder: Path, *words: str) -> subprocess.Popen[str]:
    own = (f"hydra.launcher.address={ray.address}", f"store.folder={project / 'store'}", f"hydra.sweep.dir={folder}")
    command = [sys.executable, "-m", "optpipe", *WORDS, *words, *own]
    return subprocess.Popen(
        command, cwd=project, env=ray.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finished(
    process: subprocess.Popen[str],
    ray: Cluster,
    seen: Seen,
    folder: Path,
    act: Callable[[int, int], None] = lambda number, pid: None,
) -> tuple[int, str]:
    """Watch a sweep to its end; `act` is called with number and process of each job that runs, again and again."""
    until = time.monotonic() + UNTIL_SECONDS
    while process.poll() is None and time.monotonic() < until:
        for read in ledger(folder):
            if read["state"] == "running" and noted(seen, ray, read):
                act(read["number"], read["pid"])
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
    out, _ = process.communicate()
    return process.returncode, out


def noted(seen: Seen, ray: Cluster, read: dict[str, Any]) -> bool:
    """Remember who runs a job; whether somebody does."""
    number, pid = read["number"], read["pid"]
    try:
        children = psutil.Process(pid).children(recursive=True)
        at = ray.node_of(pid)
    except (psutil.NoSuchProcess, StopIteration):
        return False
    seen.processes += [child for child in children if child not in seen.processes]
    if pid not in seen.pids.setdefault(number, []):
        seen.pids[number].append(pid)
        seen.nodes.setdefault(number, []).append(at)
    return True


def alive(seen: Seen) -> list[psutil.Process]:
    """Those processes that jobs started which still run."""
    wait_for(lambda: not any(process.is_running() for process in seen.processes), 5)
    return [process for process in seen.processes if process.is_running()]


def ledger(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text()) for path in paths]


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


if __name__ == "__main__":
    sys.exit(main())

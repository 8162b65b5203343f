"""A search and its tracking in PostgreSQL: is it a URI away? Starts a server of its own on 127.0.0.1, and ends it.

    pip install "psycopg[binary]" psycopg2-binary; python benchmarks/postgres.py     # needs PostgreSQL's initdb

A search of three trials keeps its study there and its runs in MLflow's tables; the same study then goes on to five in
another folder. Ends with 1 unless both find what they should.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WORDS = (
    "--multirun", "+recipe=edge_int8", "hydra/sweeper=search", "prune.ratio=range(0.3,0.96,0.05)",
    "pipeline=[prune,trace]", "hydra.sweeper.study=ours", "hydra.sweeper.objectives=[quality,size]",
    "target.instruction_set=neon", "measure.previews=false", "rehearse=false",
)  # fmt: skip


def main() -> int:
    if not all(map(importlib.util.find_spec, ("psycopg", "psycopg2"))):
        sys.exit('this needs drivers: pip install "psycopg[binary]" psycopg2-binary')
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as uri:
        counts = []
        for trials in (3, 5):
            folder = Path(name) / f"sweep_{trials}"
            words = [*WORDS, f"hydra.sweeper.storage={uri}/studies", f"tracking.uri={uri}/mlflow"]
            words += [f"hydra.sweeper.trials={trials}", f"hydra.sweep.dir={folder}"]
            done = subprocess.run([sys.executable, "-m", "optpipe", *words], capture_output=True, text=True)
            print(done.stderr)
            if done.returncode:
                sys.exit(f"ended with {done.returncode}:\n{done.stdout}")
            counts.append(len(list(folder.glob("[0-9]*/report.json"))))
        trials, runs = found(f"{uri}/studies", f"{uri}/mlflow")
    print(f"jobs of the two sweeps: {counts}; trials of the study: {trials}; recipe runs in MLflow: {runs}")
    return int((counts, trials, runs) != ([3, 2], 5, 5))


def found(studies: str, tracking: str) -> tuple[int, int]:
    """Trials of the study that were run (it keeps repeats too), and recipe runs, as their own libraries read them."""
    import optuna
    from mlflow import MlflowClient

    study = optuna.load_study(study_name="ours", storage=studies)
    client = MlflowClient(tracking_uri=tracking)
    experiment = client.get_experiment_by_name("optpipe")
    runs = client.search_runs([experiment.experiment_id], "params.recipe = 'edge_int8'")
    return len([trial for trial in study.trials if trial.state.name == "COMPLETE"]), len(runs)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URI of a server with the databases `studies` and `mlflow`; it does not run as root."""
    data, port = folder / "data", free_port()
    user = pwd.getpwnam("nobody").pw_name if os.geteuid() == 0 else None
    data.mkdir()
    if user:
        folder.chmod(0o755)
        shutil.chown(data, user)
    subprocess.run(
        [program("initdb"), "-D", data, "-U", "optpipe", "--auth=trust"],
        check=True,
        user=user,
        stdout=subprocess.DEVNULL,
    )
    settings = ["-c", "listen_addresses=127.0.0.1", "-p", str(port), "-c", "unix_socket_directories="]
    with subprocess.Popen(
        [program("postgres"), "-D", data, *settings], user=user, stderr=subprocess.DEVNULL
    ) as process:
        try:
            for database in ("studies", "mlflow"):
                created(port, database)
            yield f"postgresql://optpipe@127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown: at SIGTERM it would wait for its clients


def created(port: int, database: str) -> None:
    import psycopg2

    until = time.monotonic() + 30
    while True:
        try:
            connection = psycopg2.connect(host="127.0.0.1", port=port, user="optpipe", dbname="postgres")
            break
        except psycopg2.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {database}")
    connection.close()


def program(name: str) -> str:
    """PostgreSQL's own are seldom on the PATH."""
    places = [shutil.which(name), *map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))]
    found = next((place for place in places if place), None)
    return found or sys.exit(f"there is no {name}; install PostgreSQL's server")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())

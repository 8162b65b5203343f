"""hydra/launcher=ray: the jobs of a sweep on the machines of a Ray cluster that is running.

hydra-ray-launcher (1.2.2) cannot serve: it asks for cloudpickle<3, which nothing else here can have, does not join a
running cluster unless told to, runs jobs in the folder where `ray start` was typed, and ends the sweep with the first
job whose worker dies for good. Here who starts the sweep watches over its jobs: Ray says for sure which worker has
died, on whatever machine, which the ledger alone cannot know.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

STOP_SECONDS = 20.0  # for jobs to write down that they wait again, after Ctrl-C


class RayLauncher(Launcher):  # type: ignore[misc]
    """Runs the jobs of an optpipe sweep as tasks of a Ray cluster, and those whose worker died again.

    address: of the cluster, as host:port; "auto" for the one that RAY_ADDRESS or this machine knows; "local" for one
    of the sweep's own on this machine.
    num_cpus, num_gpus, resources: what a job takes of a machine, in Ray's words; it computes with as many threads.
    max_retries: how often a job is begun again after its worker or its machine died.
    """

    def __init__(
        self, address: str, num_cpus: int, num_gpus: float, max_retries: int, resources: dict[str, float] | None
    ) -> None:
        if num_cpus < 1 or max_retries < 0:
            raise ValueError(f"num_cpus is {num_cpus}, max_retries {max_retries}; at least 1 and 0 are needed")
        self.address, self.max_retries = address, max_retries
        self.options: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "resources": dict(resources or {}),
            "max_retries": 0,  # by Ray itself, which does not know the ledger
            "scheduling_strategy": "SPREAD",  # jobs on one machine wait for one another whenever one of them measures
        }

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from optpipe.progress import quiet

        setup_globals()
        payloads = {
            number: self._payload(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)
        }
        with quiet("optpipe"), _cluster(self.address) as ray:  # Hydra would print every line once more
            self._say_where(ray, len(payloads))
            remote = ray.remote(**self.options)(_job)
            begin = {number: (remote, (os.getcwd(), sys.path, payload)) for number, payload in payloads.items()}
            found = _Watch(ray, Path(str(self.config.hydra.sweep.dir)), begin, self.max_retries).run()
        return [found[number] for number in sorted(found)]

    def _payload(self, number: int, overrides: Sequence[str]) -> bytes:
        import cloudpickle

        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        payload: bytes = cloudpickle.dumps((Singleton.get_state(), self.hydra_context, config, self.task_function))
        return payload

    def _say_where(self, ray: Any, num_jobs: int) -> None:
        from optpipe.progress import say

        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        asked = self.options["num_cpus"]
        say(f"{num_jobs} jobs on a Ray cluster of {len(machines)} machine(s), {asked} of {sum(machines):g} cores each")
        if max(machines, default=0) < asked:
            most = max(machines, default=0)
            say(f"no machine of it has {asked} cores yet, and jobs wait for one; set hydra.launcher.num_cpus={most:g}")


class _Watch:
    """The jobs of one launch while the cluster runs them."""

    def __init__(self, ray: Any, folder: Path, begin: dict[int, tuple[Any, tuple[Any, ...]]], retries: int) -> None:
        from optpipe.sweep import Ledger

        self.ray, self.ledger, self.begin, self.retries = ray, Ledger(folder), begin, retries
        self.attempts = dict.fromkeys(begin, 0)
        self.running: dict[Any, int] = {}

    def run(self) -> dict[int, JobReturn]:
        """What each job returned, by its number. Ctrl-C stops them all, and is raised then."""
        found: dict[int, JobReturn] = {}
        self._find_lost()
        try:
            for number in self.begin:
                self._submit(number)
            while self.running:
                (task,), _ = self.ray.wait(list(self.running), num_returns=1)
                number = self.running.pop(task)
                if (returned := self._ended(task, number)) is not None:
                    found[number] = returned
        except KeyboardInterrupt:
            self._stop()
            raise
        return found

    def _find_lost(self) -> None:
        """Jobs that an earlier command left on other machines: asks there whether their processes have ended."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from optpipe.sweep import State, is_gone

        nodes = {node["NodeManagerHostname"]: node["NodeID"] for node in self.ray.nodes() if node["Alive"]}
        for job in self.ledger.jobs():
            if job.state is State.running and job.number in self.begin and job.host in nodes:
                there = NodeAffinitySchedulingStrategy(nodes[job.host], soft=False)
                asked = self.ray.remote(num_cpus=0, scheduling_strategy=there)(is_gone)
                if self.ray.get(asked.remote(job)):
                    self.ledger.died(job.number, f"its process on {job.host} has ended", again=True)

    def _submit(self, number: int) -> None:
        remote, words = self.begin[number]
        self.attempts[number] += 1
        self.running[remote.remote(*words)] = number

    def _ended(self, task: Any, number: int) -> JobReturn | None:
        """What a job returned; None if it was begun again."""
        from ray.exceptions import RayError, RayTaskError

        try:
            returned: JobReturn = self.ray.get(task)
            self.ledger.tell(self.ledger.job(number))
            return returned
        except RayTaskError as error:  # before optpipe was reached: the machine lacks a folder or a package
            self.ledger.died(number, f"it could not be begun there: {error.cause or error}")
        except RayError as error:
            again, times = self.attempts[number] <= self.retries, self.attempts[number]
            reason = f"its worker died ({type(error).__name__}), {times} of {self.retries + 1} times"
            if self.ledger.died(number, reason, again=again) and again:
                self._submit(number)
                return None
        return JobReturn(status=JobStatus.COMPLETED)  # the ledger has what became of it: Hydra goes on

    def _stop(self) -> None:
        """As with Ctrl-C in each of them; those that do not listen are killed."""
        tasks = list(self.running)
        for task in tasks:
            self.ray.cancel(task)
        _, deaf = self.ray.wait(tasks, num_returns=len(tasks), timeout=STOP_SECONDS)
        for task in deaf:
            self.ray.cancel(task, force=True)
        for task in deaf:
            self.ledger.died(self.running[task], "interrupted", again=True)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`. Raises ConfigCompositionException, which Hydra shows as one line."""
    try:
        import ray
    except ImportError:
        raise ConfigCompositionException('hydra/launcher=ray needs ray; pip install "optpipe[ray]"') from None
    before = signal.getsignal(signal.SIGTERM)
    try:
        _answers(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        said = f"there is no Ray cluster at hydra.launcher.address={address} ({str(error).splitlines()[0]}); "
        raise ConfigCompositionException(f"{said}start one with `ray start --head`, or name its host:port") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has put its own there, which ends without stopping the jobs
    try:
        yield ray
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Raises OSError where nothing listens at host:port: Ray would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)  # as Ray does
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


def _job(folder: str, path: list[str], payload: bytes) -> JobReturn:
    """One job, on a worker: in the folder that the sweep was started in, with what can be imported there."""
    import cloudpickle

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as optpipe's own command does, before torch is imported
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{socket.gethostname()} does not see '{folder}', where the sweep was started")
    os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path]
    state, context, config, task_function = cloudpickle.loads(payload)
    setup_globals()
    Singleton.set_state(state)
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=context,
        task_function=task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )

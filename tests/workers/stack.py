"""Real workers and reconcilers, as processes, on a state folder and a queue of their own."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from services.artifacts.store import ArtifactStore
from services.jobs.registry import Job, JobRegistry
from services.jobs.signals import Bell

LEASE = 1.5
# Processes are forked from one that has these imports, which take most of a second.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["workers.app", "workers.collector"])


class Process:
    """``python -m ...`` with an environment of its own, output into a file and a pipe as standard input; a
    :class:`subprocess.Popen` as far as tests need it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        theirs, mine = FORKED.Pipe(duplex=False)
        self.stdin = io.FileIO(os.dup(mine.fileno()), "w")
        mine.close()
        self._process = FORKED.Process(target=_run, args=(command, dict(environment), log, theirs))
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit status if it has ended; a negative number is a signal."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status once it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _run(command: Sequence[str], environment: Mapping[str, str], log: Path, stdin: Connection) -> None:
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def wait_for(what: str, check: Callable[[], Any], seconds: float = 20.0) -> Any:
    """The first true answer of ``check``."""
    deadline = time.monotonic() + seconds
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether the process is no more."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Stack:
    """What the tests of this folder run on."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.state, self.redis_url = folder / "state", redis_url
        self.queue = f"test-{uuid4().hex[:8]}"
        self.registry = JobRegistry.open(f"sqlite:///{self.state / 'registry.db'}")
        self.store = ArtifactStore(str(self.state / "store"))
        self.bell = Bell(redis_url)
        self.processes: list[Process] = []
        self.logs = folder / "logs"
        self.logs.mkdir()

    def start(self, *command: str, **settings: str) -> Process:
        """A process of the platform."""
        environment = {
            **os.environ,
            "REDIS_URL": self.redis_url,
            "ETHOGRAM_STATE": str(self.state),
            "ETHOGRAM_QUEUES": self.queue,
            "ETHOGRAM_LEASE_SECONDS": str(LEASE),
            "ETHOGRAM_CHECKPOINT_SECONDS": "0.2",
            "ETHOGRAM_GRACE_SECONDS": "3",
            **{f"ETHOGRAM_{name.upper()}": value for name, value in settings.items()},
        }
        process = Process(command, environment, self.logs / f"{len(self.processes)}-{command[0]}.log")
        self.processes.append(process)
        return process

    def worker(self, job: str = "count", **settings: str) -> Process:
        """A worker whose jobs are run by a function of ``tests/workers/science.py``, or by ``module:function``."""
        return self.start("tests.workers.worker", job, "--parent-pipe", **settings)

    def reconciler(self) -> Process:
        """A reconciler."""
        return self.start("workers.reconciler", "--parent-pipe")

    def said(self) -> str:
        """All that the processes logged."""
        return "\n".join(path.read_text() for path in sorted(self.logs.iterdir()))

    def submit(self, steps: int = 20, seconds: float = 0.05, seed: int = 0, **options: Any) -> Job:
        """A job, and a ring."""
        spec = GenerationSpec(seed=seed, training=SubjectTrainingSpec(steps=steps, learning_rate=seconds))
        job, _ = self.registry.submit("generation", spec, queue=self.queue, **options)
        self.bell.ring(self.queue)
        return job

    def wait(self, job: Job, *states: str, seconds: float = 30.0) -> Job:
        """The job once it is in one of ``states``, by default the terminal ones."""

        def check() -> Job | None:
            now = self.registry.get(job.id)
            return now if now.state in states or (not states and now.state.terminal) else None

        found: Job = wait_for(f"{job.id} to be {states or 'terminal'}; {self.said()}", check, seconds)
        return found

    def wait_checkpoint(self, job: Job) -> Job:
        """The job once it has a checkpoint."""

        def check() -> Job | None:
            now = self.registry.get(job.id)
            return now if now.checkpoint else None

        found: Job = wait_for(f"a checkpoint of {job.id}; {self.said()}", check)
        return found

    def server(self, worker: Process) -> int:
        """Process id of the worker's one fork server."""
        servers = wait_for("a fork server", lambda: psutil.Process(worker.pid).children())
        pid: int = servers[0].pid
        return pid

    def child(self, worker: Process) -> int:
        """Process id of the worker's one job."""
        children = wait_for("a child", lambda: psutil.Process(self.server(worker)).children())
        pid: int = children[0].pid
        return pid

    def history(self, job: Job) -> list[str]:
        """The states that the job went through; for a release also why."""
        events = [event.data for event in self.registry.events(job.id) if event.type == "state"]
        return [f"{data['state']}" + (f" {data['reason']}" if "reason" in data else "") for data in events]

    def log(self, job: Job) -> list[str]:
        """The lines that the job logged."""
        return [event.data["message"] for event in self.registry.events(job.id) if event.type == "log"]

    def begins(self, job: Job) -> list[int]:
        """The steps that its attempts began at."""
        return [int(found[1]) for line in self.log(job) if (found := re.fullmatch(r"begins at (\d+)", line))]

    def helper(self, job: Job) -> int:
        """Process id of the process that the job ``hang`` starts."""
        lines = wait_for("the helper", lambda: [line for line in self.log(job) if line.startswith("helper ")])
        return int(lines[0].split()[1])

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
            process.stdin.close()
        self.bell.close(0.1)
        self.registry.close()

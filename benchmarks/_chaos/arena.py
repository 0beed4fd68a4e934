"""The platform as processes that may be killed: each is started again, as ``ethogram up`` does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import redis

from benchmarks._chaos import points
from ethogram.client import Client
from services.artifacts.store import ArtifactStore
from services.jobs.registry import JobRegistry
from tests.conftest import free_port
from tests.postgres_server import PostgresServer, start_postgres
from tests.redis_server import start_redis

LEASE = 2.0
WORKERS, GATEWAYS, SLOTS = 2, 2, 2
_MARK = "benchmarks._chaos"


class Arena:
    """Two workers, two gateways, a reconciler, Redis and a database."""

    def __init__(self, folder: Path, database: str) -> None:
        self.state, self.logs, self.faults = folder / "state", folder / "logs", folder / "state" / "faults"
        for made in (self.logs, self.faults):
            made.mkdir(parents=True)
        self.postgres: PostgresServer | None = start_postgres(folder) if database == "postgresql" else None
        self.database = self.postgres.url if self.postgres else f"sqlite:///{self.state / 'registry.db'}"
        self.redis_port = free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self._redis = start_redis(self.redis_port, self.state)
        self.registry = JobRegistry.open(self.database)
        self.store = ArtifactStore(str(self.state / "store"))
        self._ports = [free_port() for _ in range(GATEWAYS)]
        self.clients = [Client(f"http://127.0.0.1:{port}") for port in self._ports]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.paused: set[str] = set()
        self.started: dict[str, float] = {}
        self._stopping = threading.Event()
        self._lock = threading.RLock()
        for name in self.names:
            self._start(name)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        self._wait_ready()

    @property
    def names(self) -> list[str]:
        """The processes that the arena keeps alive."""
        workers = [f"worker-{i}" for i in range(WORKERS)]
        return [*workers, *(f"gateway-{i}" for i in range(GATEWAYS)), "reconciler"]

    def pid(self, name: str) -> int:
        """Of one of them, which lives."""
        while True:
            process = self.processes[name]
            if process.poll() is None:
                return process.pid
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """``kill -9``."""
        self.processes[name].kill()

    def children(self, name: str) -> list[psutil.Process]:
        """The jobs' processes of a worker."""
        with suppress(psutil.NoSuchProcess):
            return [child for child in psutil.Process(self.processes[name].pid).children() if _alive(child)]
        return []

    def restart_redis(self, pause: float) -> None:
        """Kill Redis, and start an empty one ``pause`` seconds later."""
        self._redis.kill()
        self._redis.wait()
        time.sleep(pause)
        self._redis = start_redis(self.redis_port, self.state)

    def flush_redis(self) -> None:
        """FLUSHALL."""
        with suppress(redis.RedisError), redis.Redis(port=self.redis_port) as client:
            client.flushall()

    def descendants(self) -> list[psutil.Process]:
        """Every living process of the arena's jobs, wherever it hangs."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                if "workers.child" in command and any(_MARK in word for word in command) and _alive(process):
                    found.append(process)
        return found

    def orphans(self) -> list[psutil.Process]:
        """Jobs' processes whose worker is gone."""
        workers = {process.pid for name, process in self.processes.items() if name.startswith("worker")}
        found = []
        for process in self.descendants():
            with suppress(psutil.Error):
                if process.ppid() not in workers:
                    found.append(process)
        return found

    def close(self) -> int:
        """End it in order; how many processes of jobs are left."""
        self._stopping.set()
        self._keeper.join()
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        deadline = time.monotonic() + 8
        while self.descendants() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.descendants()
        for orphan in left:
            with suppress(psutil.Error):
                orphan.kill()
        for client in self.clients:
            client.close()
        self.registry.close()
        self._redis.kill()
        self._redis.wait()
        if self.postgres is not None:
            self.postgres.close()
        return len(left)

    def _start(self, name: str) -> None:
        kind, _, number = name.partition("-")
        environment = {
            **os.environ,
            points.VARIABLE: str(self.faults),
            "REDIS_URL": self.redis_url,
            "ETHOGRAM_STATE": str(self.state),
            "ETHOGRAM_DATABASE_URL": self.database,
            "ETHOGRAM_SLOTS": str(SLOTS),
            "ETHOGRAM_LEASE_SECONDS": str(LEASE),
            "ETHOGRAM_CHECKPOINT_SECONDS": "0.4",
            "ETHOGRAM_GRACE_SECONDS": "3",
        }
        if kind == "gateway":
            environment["ETHOGRAM_PORT"] = str(self._ports[int(number)])
        with (self.logs / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", f"{_MARK}.{kind}", name, "--parent-pipe"]
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        self.started[name] = time.monotonic()

    def _keep(self) -> None:
        while not self._stopping.wait(0.1):
            for name in self.names:
                if self.processes[name].poll() is not None:
                    stdin = self.processes[name].stdin
                    assert stdin is not None
                    stdin.close()
                    self._start(name)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        for client in self.clients:
            wait(lambda client=client: _answers(client), deadline - time.monotonic(), "a gateway")  # type: ignore[misc]
        for name in ("worker-0", "worker-1", "reconciler"):
            ready = f"{name.partition('-')[0]} ready"
            wait(lambda name=name, ready=ready: ready in (self.logs / f"{name}.log").read_text(), 60, name)  # type: ignore[misc]


def wait(check: Callable[[], object], seconds: float, what: str) -> None:
    """Until ``check`` holds."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)


def pick(chance: random.Random, names: list[str]) -> str:
    """One of ``names``."""
    return names[chance.randrange(len(names))]


def _answers(client: Client) -> bool:
    try:
        return bool(client.info())
    except Exception:
        return False


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False

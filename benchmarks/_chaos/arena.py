"""The platform as processes that may be killed: each is started again, as ``ethogram up`` does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks._chaos import points
from benchmarks._chaos.orphans import Orphans
from ethogram.client import Client
from services.artifacts.store import ArtifactStore
from services.jobs.registry import JobRegistry
from tests.conftest import free_port
from tests.postgres_server import PostgresServer, start_postgres
from tests.redis_server import start_redis

LEASE = 2.0
WORKERS, GATEWAYS, SLOTS = 2, 2, 2
# After this a job's process that lost its worker must be gone: it may clean up for three seconds.
ORPHAN_SECONDS = 8.0
_MARK = "benchmarks._chaos"


class Arena:
    """Two workers, two gateways, a reconciler, Redis and a database."""

    def __init__(self, folder: Path, database: str) -> None:
        self.state, self.logs, self.faults = folder / "state", folder / "logs", folder / "state" / "faults"
        self._redis_folder = folder / "redis"
        for made in (self.logs, self.faults, self._redis_folder):
            made.mkdir(parents=True)
        self.file = self.state / "registry.db"
        """Of SQLite."""
        self.postgres: PostgresServer | None = start_postgres(folder) if database == "postgresql" else None
        self.database = self.postgres.url if self.postgres else f"sqlite:///{self.file}"
        self.redis_port = free_port()
        self.redis_url = f"redis://127.0.0.1:{self.redis_port}/0"
        self._redis = start_redis(self.redis_port, self._redis_folder, durable=True)
        self.registry = JobRegistry.open(self.database)
        self.store = ArtifactStore(str(self.state / "store"))
        self._ports = [free_port() for _ in range(GATEWAYS)]
        self.clients = [Client(f"http://127.0.0.1:{port}") for port in self._ports]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started: dict[str, float] = {}
        """When each was started last."""
        self._said: dict[str, int] = {}
        self.orphans = Orphans(self.state, ORPHAN_SECONDS)
        self._stopping = threading.Event()
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
        os.kill(self.pid(name), signal.SIGKILL)

    def children(self, name: str) -> list[psutil.Process]:
        """The jobs' processes of a worker."""
        with suppress(psutil.NoSuchProcess):
            return [child for child in psutil.Process(self.processes[name].pid).children() if _alive(child)]
        return []

    def restart_redis(self, pause: float, *, empty: bool) -> None:
        """Kill Redis, and start it ``pause`` seconds later: an empty one, or one that knows what it knew."""
        self._redis.kill()
        self._redis.wait()
        time.sleep(pause)
        if empty:
            shutil.rmtree(self._redis_folder)
            self._redis_folder.mkdir()
        self._redis = start_redis(self.redis_port, self._redis_folder, durable=True)

    def flush_redis(self) -> None:
        """FLUSHALL."""
        with suppress(redis.RedisError), redis.Redis(port=self.redis_port) as client:
            client.flushall()

    def ready(self, name: str) -> bool:
        """Whether the process has said so since it was started last."""
        said = (self.logs / f"{name}.log").read_bytes()[self._said[name] :]
        return f"{name.partition('-')[0]} ready".encode() in said

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
        deadline = time.monotonic() + ORPHAN_SECONDS
        while self.orphans.living() and time.monotonic() < deadline:
            time.sleep(0.1)
        left = self.orphans.living()
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
            # The developer's own platform is none of this one's business.
            **{name: value for name, value in os.environ.items() if not name.startswith("ETHOGRAM_")},
            points.VARIABLE: str(self.faults),
            "REDIS_URL": self.redis_url,
            "ETHOGRAM_STATE": str(self.state),
            "ETHOGRAM_DATABASE_URL": self.database,
            "ETHOGRAM_SLOTS": str(SLOTS),
            "ETHOGRAM_LEASE_SECONDS": str(LEASE),
            "ETHOGRAM_CHECKPOINT_SECONDS": "0.4",
            "ETHOGRAM_GRACE_SECONDS": "3",
            # Collecting all the time: what is needed must stay, whatever happens meanwhile.
            "ETHOGRAM_GC_GRACE_SECONDS": "2",
            "ETHOGRAM_GC_PERIOD_SECONDS": "1",
        }
        if kind == "gateway":
            environment["ETHOGRAM_PORT"] = str(self._ports[int(number)])
        with (self.logs / f"{name}.log").open("ab") as log:
            self._said[name] = log.tell()
            command = [sys.executable, "-m", f"{_MARK}.{kind}", name, "--parent-pipe"]
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        self.started[name] = time.monotonic()

    def _keep(self) -> None:
        looked = time.monotonic()
        while not self._stopping.wait(0.1):
            for name in self.names:
                if self.processes[name].poll() is not None:
                    stdin = self.processes[name].stdin
                    assert stdin is not None
                    stdin.close()
                    self._start(name)
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                self.orphans.look({process.pid for process in self.processes.values()})

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        for client in self.clients:
            wait(lambda client=client: _answers(client), deadline - time.monotonic(), "a gateway")  # type: ignore[misc]
        for name in ("worker-0", "worker-1", "reconciler"):
            wait(lambda name=name: self.ready(name), 60, name)  # type: ignore[misc]


def wait(check: Callable[[], object], seconds: float, what: str) -> None:
    """Until ``check`` holds."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.05)


def spawn(wrong: list[str], function: Callable[..., None], *words: Any) -> threading.Thread:
    """``function`` in a thread; should it raise, that is added to ``wrong``."""

    def guarded() -> None:
        try:
            function(*words)
        except Exception as error:
            wrong.append(f"{function.__name__}: {error!r}")

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread


def _answers(client: Client) -> bool:
    try:
        return bool(client.info())
    except Exception:
        return False


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False

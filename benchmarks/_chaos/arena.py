"""A platform whose processes may be killed: each is started again, as ``ethogram up`` does."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks._chaos import points
from ethogram.client import Client
from ethogram.platform.process import Child
from ethogram.platform.stack import free_port
from services.artifacts.store import ArtifactStore
from services.jobs.registry import JobRegistry
from tests.postgres_server import PostgresServer, start_postgres
from tests.redis_server import start_redis

LEASE = 2.0
"""Seconds."""
WORKERS, GATEWAYS = ("worker-0", "worker-1"), ("gateway-0", "gateway-1")
NAMES = (*WORKERS, *GATEWAYS, "reconciler")
SLOTS = 2
# A job's process that lost its worker may clean up for three seconds; after this it must be gone.
ORPHAN_SECONDS = 8.0
READY_SECONDS = 60.0


class Orphans:
    """Watches the processes that work in a folder, wherever they hang in the tree of processes."""

    def __init__(self, folder: Path, patience: float) -> None:
        """``patience``: seconds that a process without its parent has to clean up."""
        self._folder, self._patience = folder.resolve(), patience
        self._since: dict[int, float] = {}
        self.found: dict[int, str] = {}
        """Commands of those that stayed longer, by process id."""

    def living(self) -> list[psutil.Process]:
        """All processes that work in the folder."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self._folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def look(self, parents: Container[int]) -> None:
        """Record new orphans. ``parents``: process ids whose children are not orphans."""
        living = self.living()
        children = {process.pid for process in living}
        now, since = time.monotonic(), dict[int, float]()
        for process in living:
            with suppress(psutil.Error):
                # As long as a parent lives, it ends what it has started itself, though not while it is paused.
                if process.ppid() in parents or process.ppid() in children:
                    continue
                since[process.pid] = self._since.get(process.pid, now)
                if now - since[process.pid] > self._patience:
                    self.found[process.pid] = " ".join(process.cmdline())
        self._since = since


class Arena:
    """Two workers, two gateways, a reconciler, Redis and a database."""

    def __init__(self, folder: Path, database: str) -> None:
        self.state, self.logs, self.faults = folder / "state", folder / "logs", folder / "state" / "faults"
        self._redis_folder = folder / "redis"
        for made in (self.logs, self.faults, self._redis_folder):
            made.mkdir(parents=True)
        self.sqlite_file = self.state / "registry.db"
        self.postgres: PostgresServer | None = start_postgres(folder) if database == "postgresql" else None
        self.database = self.postgres.url if self.postgres else f"sqlite:///{self.sqlite_file}"
        self._redis_port = free_port()
        self._redis = start_redis(self._redis_port, self._redis_folder, durable=True)
        self.registry = JobRegistry.open(self.database)
        self.store = ArtifactStore(str(self.state / "store"))
        ports = {name: free_port() for name in GATEWAYS}
        self.clients = [Client(f"http://127.0.0.1:{port}") for port in ports.values()]
        self._processes = {name: self._process(name, ports.get(name, 0)) for name in NAMES}
        self.started: dict[str, float] = {}
        """When each process was last started, on the monotonic clock."""
        self.orphans = Orphans(self.state, ORPHAN_SECONDS)
        self._stopping = threading.Event()
        for name in NAMES:
            self._start(name)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        deadline = time.monotonic() + READY_SECONDS
        while not all(map(self.ready, NAMES)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the platform was not ready after {READY_SECONDS:.0f} s; its logs: {self.logs}")
            time.sleep(0.05)

    def pid(self, name: str) -> int:
        """Process id of ``name``, once it lives."""
        while (pid := self._processes[name].pid) is None:
            time.sleep(0.05)
        return pid

    def kill(self, name: str) -> None:
        """``kill -9``."""
        os.kill(self.pid(name), signal.SIGKILL)

    def children(self) -> list[psutil.Process]:
        """The jobs' processes of the workers, and those that start them."""
        children: list[psutil.Process] = []
        for pid in (self._processes[worker].pid for worker in WORKERS):
            with suppress(psutil.NoSuchProcess):
                found = psutil.Process(pid).children(recursive=True) if pid is not None else []
                children += [child for child in found if child.status() != psutil.STATUS_ZOMBIE]
        return children

    def restart_redis(self, pause: float, *, empty: bool) -> None:
        """Kill Redis and start it again after ``pause`` seconds, with its data or ``empty``."""
        self._redis.kill()
        self._redis.wait()
        time.sleep(pause)
        if empty:
            shutil.rmtree(self._redis_folder)
            self._redis_folder.mkdir()
        self._redis = start_redis(self._redis_port, self._redis_folder, durable=True)

    def flush_redis(self) -> None:
        """FLUSHALL."""
        with suppress(redis.RedisError), redis.Redis(port=self._redis_port) as client:
            client.flushall()

    def ready(self, name: str) -> bool:
        """Whether the process has logged that it is ready since it was last started."""
        return self._processes[name].logged(f"{name.partition('-')[0]} ready")

    def close(self) -> int:
        """End all processes in order; returns how many processes are left."""
        self._stopping.set()
        self._keeper.join()
        for process in self._processes.values():
            if process.pid is not None:
                os.kill(process.pid, signal.SIGCONT)
            process.terminate()
        for process in self._processes.values():
            process.finish(time.monotonic() + 20)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := self.orphans.living()) and time.monotonic() < deadline:
            time.sleep(0.1)
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

    def _process(self, name: str, port: int) -> Child:
        environment = {
            # The developer's own platform is none of this one's business.
            **{name: value for name, value in os.environ.items() if not name.startswith("ETHOGRAM_")},
            points.VARIABLE: str(self.faults),
            "REDIS_URL": f"redis://127.0.0.1:{self._redis_port}/0",
            "ETHOGRAM_STATE": str(self.state),
            "ETHOGRAM_DATABASE_URL": self.database,
            "ETHOGRAM_PORT": str(port),
            "ETHOGRAM_SLOTS": str(SLOTS),
            "ETHOGRAM_LEASE_SECONDS": str(LEASE),
            "ETHOGRAM_CHECKPOINT_SECONDS": "0.4",
            "ETHOGRAM_GRACE_SECONDS": "3",
            # It collects all the time: what is needed must stay, whatever happens meanwhile.
            "ETHOGRAM_GC_GRACE_SECONDS": "2",
            "ETHOGRAM_GC_PERIOD_SECONDS": "1",
        }
        command = [sys.executable, "-m", "benchmarks._chaos.points", name, "--parent-pipe"]
        return Child(name, command, environment, self.logs / f"{name}.log")

    def _start(self, name: str) -> None:
        self._processes[name].start()
        self.started[name] = time.monotonic()

    def _keep(self) -> None:
        looked = time.monotonic()
        while not self._stopping.wait(0.1):
            for name, process in self._processes.items():
                if process.exit_code is not None:
                    self._start(name)
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                # All of them work in the state folder, and so do the processes that start jobs.
                self.orphans.look({os.getpid()})


def spawn(errors: list[str], function: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Run ``function`` in a thread; an exception that it raises is added to ``errors``."""

    def guarded() -> None:
        try:
            function(*arguments)
        except Exception as error:
            errors.append(f"{function.__name__}: {error!r}")

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread

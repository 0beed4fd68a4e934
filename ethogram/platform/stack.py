"""The whole platform as child processes on loopback: Redis, gateway, worker, reconciler and inference.

Nothing of the server side is imported here; each process is started by name and configured by its environment.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from random import SystemRandom
from typing import IO, Self

import grpc
import httpx

from ethogram.errors import Conflict, InvalidInput, Unavailable
from ethogram.platform import guard, redis
from ethogram.platform.process import Child, describe, module_command, server_environment
from ethogram.platform.state import HOST, StateDir

_START_SECONDS = 60.0
# The worker has to checkpoint its jobs.
_STOP_SECONDS = 30.0
# Outgoing connections have ports from 32768 on (Linux by default), and Kubernetes nodes those from 30000 on.
_PORTS = range(20_000, 30_000)
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]


class Platform:
    """A platform of this process: :meth:`start` it, use ``url``, :meth:`stop` it; or a ``with`` block.

    ``port`` is the gateway's; 0 takes a free one. ``say`` gets messages for people, e.g. that a
    process died and was restarted.
    """

    def __init__(self, state: StateDir, *, port: int = 0, say: Callable[[str], None] = lambda _: None) -> None:
        self.state = state
        self.url = ""
        self.inference = ""
        self.seconds: dict[str, float] = {}
        """Seconds from the start until each part answered, and ``platform`` for all."""
        self.children: dict[str, Child] = {}
        self._port = port
        self._say = say
        self._lock: IO[str] | None = None
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all processes and return when all answer.

        Raises an :class:`~ethogram.errors.EthogramError` whose message says what to do; then nothing is left running.
        """
        if find_spec("gateway") is None:
            raise Unavailable(
                "the server side is not installed here (the package `ethogram` alone is the client); run `make up` in "
                "a clone of the repository, or point ETHOGRAM_URL at a running platform"
            )
        began = time.monotonic()
        self.state.make()
        self._lock = self.state.lock()
        try:
            self._start(began)
        except BaseException:
            self.stop()
            raise

    def interrupt(self) -> None:
        """Make a running :meth:`start` give up; for signal handlers."""
        self._stopping.set()

    def stop(self, hurry: bool = False) -> None:
        """Stop all processes, Redis last, and return when none is left. ``hurry``: kill them at once."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._lock is not None:
            self.state.record.unlink(missing_ok=True)
        deadline = time.monotonic() + (0.0 if hurry else _STOP_SECONDS)
        for last in (False, True):
            group = [child for name, child in self.children.items() if (name == "redis") is last]
            for child in group:
                child.terminate()
            for child in group:
                if not child.finish(deadline):
                    self._say(f"{child.name} did not end in time and was killed; its log: {child.log}")
            deadline = time.monotonic() + (0.0 if hurry else guard.GRACE_SECONDS)
        self.children.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _start(self, began: float) -> None:
        deadline = began + _START_SECONDS
        port = self._port or free_port()
        check_port(port)
        self.url = f"http://{HOST}:{port}"
        inference_port = free_port()
        self.inference = f"{HOST}:{inference_port}"
        env = self._environment(self._start_redis(deadline))
        reconciler_metrics, inference_metrics = (_metrics_port(env, later) for later in (1, 2))

        # The gateway first and alone: people wait for it, and the imports of the others would slow it down.
        gateway = self._spawn("gateway", "gateway", {**env, "ETHOGRAM_PORT": str(port)})
        with httpx.Client(base_url=self.url, trust_env=False, timeout=2.0) as http:
            self._wait(gateway, lambda: http.get("/readyz").is_success, deadline)
        self.seconds["gateway"] = time.monotonic() - began
        inference = self._spawn(
            "inference", "services.inference", {**env, "ETHOGRAM_PORT": str(inference_port), **inference_metrics}
        )
        # A worker answers no requests; its log says when it is ready.
        level = "DEBUG" if env.get("ETHOGRAM_LOG_LEVEL") == "DEBUG" else "INFO"
        worker = self._spawn("worker", "workers", {**env, "ETHOGRAM_LOG_LEVEL": level})
        reconciler = self._spawn("reconciler", "workers.reconciler", {**env, **reconciler_metrics})
        with grpc.insecure_channel(self.inference, options=_CHANNEL_OPTIONS) as channel:
            # grpc.health.v1 in its raw form: an empty request, and field 1 of the answer is 1 (SERVING).
            check: Callable[..., bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            self._wait(inference, lambda: check(b"", timeout=2.0) == b"\x08\x01", deadline)
        self.seconds["inference"] = time.monotonic() - began
        self._wait(worker, lambda: worker.logged("worker ready"), deadline)
        self._wait(reconciler, lambda: True, deadline)
        self.seconds["platform"] = time.monotonic() - began
        self.state.write_record(self.url, self.inference)
        self._watcher = threading.Thread(target=self._watch, name="platform-watch", daemon=True)
        self._watcher.start()

    def _start_redis(self, deadline: float) -> str:
        """URL of Redis: that in ``REDIS_URL``, else one that this platform runs."""
        url = os.environ.get("REDIS_URL", "")
        if url:
            redis.check(url)
            return url
        server = redis.write_settings(self.state.redis, free_port())
        command = [sys.executable, "-I", "-S", guard.__file__, str(redis.find_server()), str(server.settings)]
        child = self._add("redis", command, dict(os.environ))
        self._wait(child, lambda: redis.ping(server.port, server.password), deadline)
        return server.url

    def _environment(self, redis_url: str) -> dict[str, str]:
        """Environment of every process of the platform."""
        return server_environment() | {
            "PYTHONUNBUFFERED": "1",
            "REDIS_URL": redis_url,
            "ETHOGRAM_DATABASE_URL": os.environ.get("ETHOGRAM_DATABASE_URL") or self.state.database_url,
            "ETHOGRAM_STORE": os.environ.get("ETHOGRAM_STORE") or str(self.state.store),
            "ETHOGRAM_STATE": str(self.state.root),
            "ETHOGRAM_HOST": HOST,
            "ETHOGRAM_INFERENCE": self.inference,
        }

    def _spawn(self, name: str, module: str, env: dict[str, str]) -> Child:
        return self._add(name, module_command(module, "--parent-pipe"), env)

    def _add(self, name: str, command: list[str], env: dict[str, str]) -> Child:
        assert self._lock is not None
        # Each child holds the lock as well: the directory is free when the last of them has left, also after a kill.
        child = Child(name, command, env, self.state.logs / f"{name}.log", inherit=[self._lock.fileno()])
        child.start()
        self.children[name] = child
        return child

    def _wait(self, child: Child, ready: Callable[[], bool], deadline: float) -> None:
        """Return when ``child`` runs and ``ready`` is true. Raises :class:`Unavailable` with the end of its log."""
        problem = ""
        while not problem:
            answered = False
            with suppress(Unavailable, httpx.TransportError, grpc.RpcError):
                answered = ready()
            if child.exit_code is not None:
                problem = f"{child.name} ended while the platform started ({describe(child.exit_code)})"
            elif answered:
                return
            elif time.monotonic() > deadline:
                problem = f"{child.name} did not answer within {_START_SECONDS:g} s"
            elif self._stopping.wait(0.02):
                raise Unavailable("the platform was stopped while it started")
        raise Unavailable(f"{problem}\nthe end of its log, {child.log}:\n{child.log_end()}")

    def _watch(self) -> None:
        while not self._stopping.wait(0.2):
            for child in self.children.values():
                with suppress(OSError):
                    child.trim()
                    news = child.revive()
                    if news:
                        self._say(news)


def _metrics_port(env: Mapping[str, str], later: int) -> dict[str, str]:
    """``ETHOGRAM_METRICS_PORT`` is the worker's; other processes have the ports after it."""
    port = env.get("ETHOGRAM_METRICS_PORT", "")
    if not port.isdecimal() or not int(port):
        return {}
    if int(port) + later > 65_535:
        text = f"is {port}, and a platform uses the two ports after it too; give at most 65533"
        raise InvalidInput.field("ETHOGRAM_METRICS_PORT", text)
    return {"ETHOGRAM_METRICS_PORT": str(int(port) + later)}


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago. It is outside the range of outgoing connections, so none of
    them takes it before its server listens, or while the server restarts. Raises :class:`Unavailable`."""
    # The generator of `random` may have been seeded, in several processes alike.
    for port in SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as listener, suppress(OSError):
            listener.bind((HOST, port))
            return port
    raise Unavailable(f"all ports of {HOST} from {_PORTS.start} to {_PORTS.stop - 1} are taken; end what uses them")


def check_port(port: int) -> None:
    """Raise :class:`Conflict` unless a server can listen on ``port`` of loopback."""
    with socket.socket() as listener:
        # As servers do: connections of the last owner in TIME_WAIT do not matter.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise Conflict(
                f"port {port} cannot be used ({error.strerror}); name another with --port, or --port 0 for any free one"
            ) from None

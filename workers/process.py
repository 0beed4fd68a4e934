"""The supervisor's side of a job's process: start it, read its last output, end it and all that it started."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ethogram.platform.process import describe, module_command
from ethogram.specs.kinds import Kind
from workers.settings import Slot

READY_SECONDS = 60.0
TAIL_BYTES = 8192
NUMBER = struct.Struct("q")
"""What the fork server answers with."""
SHARED_TMP = "/tmp"
# sun_path of a unix socket, with its NUL: 108 bytes on Linux, 104 on macOS.
MAX_SOCKET_PATH = 103

# Variables of the worker's environment that a job may see: paths, caches, the accelerator, and the credentials of
# stores and hubs; not the registry and not the broker.
ENVIRONMENT = {
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "ACTIVATIONS_ROOT", "ETHOGRAM_CACHE", "MPLCONFIGDIR"),
    *(name for proxy in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (proxy, proxy.upper())),
}
PREFIXES = (
    *("LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "NUMBA_"),
    *("HF_", "WANDB_", "AWS_", "FSSPEC_", "GOOGLE_", "AZURE_"),
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# By default OpenMP's threads spin for milliseconds at each barrier. When another process wants a core, training with
# small matrix products then takes ten times as long; with a short spin it is hardly slower.
SPIN_COUNT = "1000"


class ChildFailed(Exception):
    """The process ended, or did not answer, before it could be given work."""


def child_environment(slot: Slot, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job's process: the allowed part of ``environment`` and its slot's share of the machine."""
    return {
        **{k: v for k, v in environment.items() if k in ENVIRONMENT or k.startswith(PREFIXES)},
        **dict.fromkeys(THREAD_VARIABLES, str(slot.threads)),
        "GOMP_SPINCOUNT": SPIN_COUNT,
        "CUDA_VISIBLE_DEVICES": slot.gpus,
        # The server side runs from its source folder, which is not the job's current folder.
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


class ForkServer:
    """Starts the processes of a slot's jobs, one at a time: ``python -m workers.child`` forks them. It starts with the
    first job, and again with the next one if it has ended."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket

    def request(self, request: Mapping[str, str], streams: Sequence[int]) -> None:
        """Ask for the process of a job with these standard streams. Raises :class:`OSError`."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    module_command("workers.child"),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=child_environment(self.slot, os.environ),
                    start_new_session=True,
                )
        socket.send_fds(self._control, [json.dumps(dict(request)).encode()], streams)

    def answer(self, timeout: float) -> int | None:
        """The server's next answer, or None if there is none within ``timeout`` seconds. Raises :class:`ChildFailed` if
        the server has ended."""
        # Not select, which is limited to 1,024 descriptors: a worker of many slots has more.
        waiting = select.poll()
        waiting.register(self._control, select.POLLIN)
        if not waiting.poll(None if timeout == math.inf else 1000 * timeout):
            return None
        with suppress(ConnectionError):
            if data := self._control.recv(NUMBER.size, socket.MSG_WAITALL):
                number: int = NUMBER.unpack(data)[0]
                return number
        raise ChildFailed("the process that starts the slot's jobs ended")

    def reap(self) -> None:
        """Let go of the job's process, which has ended."""
        try:
            self._control.sendall(b".")
            self.answer(math.inf)
        except (OSError, ChildFailed):
            self.close()

    def close(self) -> None:
        """End the server; the next request starts another."""
        if self._process is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._process = None


class Child:
    """A process that runs one job, in its own session."""

    def __init__(self, kind: Kind, server: ForkServer, work_dir: Path) -> None:
        """Start it. Raises :class:`ChildFailed` when no folder can have its socket, and :class:`OSError`."""
        self._server = server
        self._folder = _socket_folder()
        self.socket = self._folder / "s"
        self.pid: int | None = None
        """Known once it is ready."""
        self._status: int | None = None
        pipes = [os.pipe() for _ in range(3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1]]
        self._stdin, self._stdout = pipes[0][1], os.fdopen(pipes[1][0], "rb")
        self._stderr = os.fdopen(pipes[2][0], "rb")
        try:
            request = {"kind": kind.name, "job": kind.job, "socket": str(self.socket), "work_dir": str(work_dir)}
            server.request(request, theirs)
        except BaseException:
            self.hang_up()
            self._stdout.close()
            self._stderr.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._tail: deque[bytes] = deque(maxlen=TAIL_BYTES // 80)
        self._drain = threading.Thread(target=self._read_stderr, name="child-stderr", daemon=True)
        self._drain.start()

    def wait_ready(self, give_up: Callable[[], bool]) -> None:
        """Return when the process serves on its socket. Raises :class:`ChildFailed`, also if ``give_up()`` is true.

        Before it is forked, its code is imported, which may take its time.
        """
        deadline = math.inf
        ready = select.poll()
        ready.register(self._stdout, select.POLLIN | select.POLLHUP)
        while time.monotonic() < deadline and not give_up():
            if self.pid is None:
                self.pid = self._server.answer(0.1)
                if self.pid is not None:
                    deadline = time.monotonic() + READY_SECONDS
            elif ready.poll(100):
                if self._stdout.readline() == b"ready\n":
                    return
                raise ChildFailed("the job's process ended before it could be given work")
        raise ChildFailed(f"the job's process did not answer within {READY_SECONDS:.0f} s")

    def ask_to_leave(self) -> None:
        """SIGTERM: checkpoint at the next opportunity, then end the run."""
        self._signal(signal.SIGTERM)

    def dump_stacks(self, timeout: float = 2.0) -> None:
        """SIGABRT: the process prints the stacks of its threads and ends. Waits for ``timeout`` seconds."""
        self._signal(signal.SIGABRT)
        self.died(timeout)

    def hang_up(self) -> None:
        """Close its standard input: the run is cancelled and the process leaves in a few seconds."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def kill(self) -> None:
        """SIGKILL to the process and everything that it started."""
        if self.pid is None:
            # It is not there yet.
            self._server.close()
        else:
            # The number is ours, since the process is not reaped before :meth:`close`, unless the fork server has
            # died; then it is ours but for a moment.
            with suppress(ProcessLookupError, PermissionError):
                try:
                    os.killpg(self.pid, signal.SIGKILL)
                except ProcessLookupError:
                    # It has no group of its own yet.
                    os.kill(self.pid, signal.SIGKILL)

    def died(self, timeout: float) -> int | None:
        """Exit status (a negative number is a signal), or None if it still runs after ``timeout`` seconds.

        The process stays unreaped, so that its group can still be killed.
        """
        if self._status is None and self.pid is not None:
            try:
                self._status = self._server.answer(timeout)
            except ChildFailed:
                # Nobody can tell how it ends, so it ends now; after that its number may be another's.
                self.kill()
                self._status, self.pid = -signal.SIGKILL, None
        return self._status

    def close(self, grace: float) -> None:
        """End the process within ``grace`` seconds and remove its folder."""
        self.hang_up()
        if self.pid is None and self._status is None:
            with suppress(ChildFailed):
                self.pid = self._server.answer(0)
        self.died(grace)
        self.kill()
        if self.pid is not None:
            self.died(math.inf)
            self._server.reap()
            self.pid = None
        self._drain.join(1.0)
        self._stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def last_output(self) -> str:
        """The end of its standard error."""
        self._drain.join(0.5)
        return b"".join(list(self._tail)).decode("utf-8", "replace")[-TAIL_BYTES // 2 :].strip()

    def _signal(self, number: int) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _read_stderr(self) -> None:
        with self._stderr, suppress(OSError):
            while chunk := self._stderr.readline(TAIL_BYTES):
                self._tail.append(chunk)


def _socket_folder() -> Path:
    """A new folder that is closed to other users and can have a socket, wherever the state folder is."""
    problems = []
    for base in dict.fromkeys((os.environ.get("TMPDIR"), SHARED_TMP, os.environ.get("XDG_RUNTIME_DIR"))):
        if not base:
            continue
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="ethogram-", dir=Path(base).absolute()))
            if len(os.fsencode(folder / "s")) > MAX_SOCKET_PATH:
                raise OSError(0, "its path is too long for a unix socket")
            # Some file systems have no sockets.
            with socket.socket(socket.AF_UNIX) as trial:
                trial.bind(str(folder / "s"))
            (folder / "s").unlink()
            return folder
        except OSError as error:
            problems.append(f"{base}: {error.strerror or error}")
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    raise ChildFailed(
        f"no folder can have the socket of the job's process ({'; '.join(problems)}); set TMPDIR to one with a short "
        "path that this user can write"
    )


def describe_exit(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"the job's process ended with status {status}"
    name = describe(status)
    hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
    return f"the job's process was killed by {name}{hint}"

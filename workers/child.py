"""The fork server of a slot, and the processes of its jobs: each serves the RPC of its kind on a unix socket, for the
supervisor that asked for it.

The server imports a job's code once and forks a process for each job, one at a time; the imports of a later job of the
kind are then done. It never uses what it imports: a device, or threads of its own, would not survive a fork. Where an
import uses some, or fails, a job's process starts a new interpreter. Standard input is a socket to the worker, see
:class:`workers.process.ForkServer`; when it ends, so does the server.

A job's process knows no database and no broker. The supervisor holds its standard input open: when that ends, so do
this process and whatever it started. It writes ``ready`` to standard output once it serves; after that, standard output
goes where standard error does.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc

from ethogram.platform.process import module_command
from ethogram.rpc import CHANNEL_OPTIONS
from ethogram.specs.kinds import KINDS
from services.kinds import request_type
from services.runtime import lifetime, logs
from services.runtime.servicer import JOB_THREAD, add_to_server
from workers.process import NUMBER

logger = logging.getLogger(__name__)

MAX_REQUEST = 65_536
DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
FORKABLE_THREADS = {"jemalloc_bg_thd"}
"""Names of threads that a fork stops and its process starts again."""
# Time that a cancelled job has to clean up.
LEAVE_SECONDS = 3.0
# Time that a trial fork has to end.
TRIAL_SECONDS = 5.0


def main() -> None:
    """Per request, whose three descriptors become the job's standard streams: answer with the process id of the job's
    process, when it has ended with its exit status (a negative number is a signal), and, once it is told to reap it,
    with zero. After a failed import, which leaves parts behind, end with the job instead."""
    logs.configure("fork server")
    control, errors = socket.socket(fileno=os.dup(0)), os.dup(2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # The worker ends this process, by closing the socket, when its jobs have ended.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    imported: set[str] = set()
    obstacle = ""
    while True:
        data, streams, _, _ = socket.recv_fds(control, MAX_REQUEST, 3)
        if not data:
            return
        request = json.loads(data)
        # If the import ends this process, the job's log says how.
        os.dup2(streams[2], 2)
        job, loaded, new_obstacle, began = request["job"], True, "", time.monotonic()
        if job not in imported and not obstacle:
            with _ending_with(control):
                loaded = load(job)
            imported.add(job)
            obstacle = new_obstacle = fork_obstacle()
        request["imports"] = time.monotonic() - began
        pid = os.fork()
        if pid == 0:
            control.close()
            os.close(errors)
            _run(request, streams, forkable=loaded and not obstacle)
        os.dup2(errors, 2)
        for stream in streams:
            os.close(stream)
        if new_obstacle:
            text = "jobs of this slot start new interpreters, which takes seconds: importing %s %s"
            logger.warning(text, job, new_obstacle)
        try:
            control.sendall(NUMBER.pack(pid))
            # Unreaped, so that its number stays taken and its group can still be killed.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            control.sendall(NUMBER.pack(status))
            control.recv(1)
            os.waitpid(pid, 0)
            if not loaded:
                return
            control.sendall(NUMBER.pack(0))
        except ConnectionError:
            return


@contextmanager
def _ending_with(control: socket.socket) -> Iterator[None]:
    """End this process, also inside, when the worker's end of ``control`` is closed."""
    done, hung_up = threading.Event(), select.poll()
    hung_up.register(control, 0)

    def watch() -> None:
        while not done.wait(0.2):
            if hung_up.poll(0):
                os._exit(0)

    watcher = threading.Thread(target=watch, name="worker")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def load(job: str) -> bool:
    """Import the module of ``job``; return whether that works. If not, the job's process tries again and tells."""
    # Apple's libraries do not survive a fork.
    if sys.platform != "darwin":
        try:
            import_module(job.partition(":")[0])
        except (Exception, SystemExit):
            return False
    # Collecting would write to, and so copy, the pages that processes share.
    gc.collect()
    gc.freeze()
    return True


def fork_obstacle() -> str:
    """What the imports did that does not survive a fork; empty if nothing."""
    if opened := [file for file in map(os.path.realpath, Path("/proc/self/fd").glob("*")) if file.startswith(DEVICES)]:
        return f"opened {opened[0]}"
    started = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if not started:
        # Libraries that can be forked, such as OpenBLAS, end their threads when a process forks.
        if not _fork_ends():
            return "does not survive a fork"
        # A thread may still be there for a moment after it was joined.
        for _ in range(10):
            if not (started := [name for name in _thread_names() if name not in FORKABLE_THREADS]):
                break
            time.sleep(0.02)
    return f"started the threads {', '.join(started)}" if started else ""


def _fork_ends() -> bool:
    """Whether a process that is forked from this one ends in time, and as it should."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    deadline = time.monotonic() + TRIAL_SECONDS
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    return ended == (pid, 0)


def _thread_names() -> Iterator[str]:
    """What the system calls the threads of this process but the first, also those that Python does not know."""
    for task in Path("/proc/self/task").glob("*"):
        if task.name != str(os.getpid()):
            with suppress(OSError):
                yield (task / "comm").read_text(encoding="utf-8").strip()


def _run(request: Mapping[str, Any], streams: Sequence[int], forkable: bool) -> None:
    """Be the process of a job; does not return."""
    try:
        os.setsid()
        renew()
        os.dup2(streams[0], 0)
        ready = os.dup(streams[1])
        os.dup2(2, 1)
        for stream in streams:
            os.close(stream)
        os.chdir(request["work_dir"])
        if not forkable:
            os.set_inheritable(ready, True)
            command = module_command("workers.child", json.dumps(request), str(ready))
            os.execv(command[0], command)
        serve(request, ready)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def renew() -> None:
    """Undo what the server set, and draw a state of its own for NumPy's global generator."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The fork has copied it. Python seeds its own again; that of PyTorch has the same seed in every new process.
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()


def serve(request: Mapping[str, Any], ready: int) -> None:
    """Serve the RPC of the job's kind until standard input ends; the descriptor ``ready`` is told when it does."""
    kind_name, path = request["kind"], Path(request["socket"])
    logs.configure("child")
    signal.signal(signal.SIGTERM, lambda *_: lifetime.stopping.set())
    if kind_name not in KINDS:
        raise SystemExit(f"this version knows no kind {kind_name!r}")
    kind = replace(KINDS[kind_name], job=request["job"])
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=CHANNEL_OPTIONS)
    add_to_server(server, kind, request_type(kind), request["imports"])
    server.add_insecure_port(f"unix:{path}")
    server.start()
    leave = threading.Event()
    lifetime.exit_on_eof(leave.set)
    os.write(ready, b"ready\n")
    os.close(ready)

    leave.wait()
    _leave(server, path)


def _leave(server: grpc.Server, path: Path) -> None:
    """Cancel the run, let it clean up for a moment, and end with everything that it started."""
    # Even if this thread no longer gets its turn.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(LEAVE_SECONDS) + 2)
    server.stop(None)
    for thread in threading.enumerate():
        if thread.name == JOB_THREAD:
            thread.join(LEAVE_SECONDS)
    with suppress(OSError):
        shutil.rmtree(path.parent)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:]:
        serve(json.loads(sys.argv[1]), int(sys.argv[2]))
    else:
        main()

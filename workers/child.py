"""The fork server of a slot, and the processes of its jobs: each serves the RPC of its kind on a unix socket, for the
supervisor that asked for it.

The server imports a job's code once and forks a process for each job, one at a time; the imports of a later job of the
kind are then done. It never uses what it imports: a device, or threads of its own, would not survive a fork; where an
import uses some, a job's process starts afresh. Standard input is a socket to the worker, see
:class:`workers.process.ForkServer`; when it ends, so does the server.

A job's process knows no database and no broker. The supervisor holds its standard input open: when that ends, so do
this process and whatever it started. It writes ``ready`` to standard output once it serves; after that, standard output
goes where standard error does.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import grpc

from ethogram.platform.process import module_command
from ethogram.rpc import CHANNEL_OPTIONS
from ethogram.specs.kinds import KINDS
from services.kinds import request_type
from services.runtime import lifetime, logs
from services.runtime.servicer import JOB_THREAD, add_to_server
from workers.process import NUMBER

MAX_REQUEST = 65_536
DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")
# Time that a cancelled job has to clean up.
LEAVE_SECONDS = 3.0


def main() -> None:
    """Per request, whose three descriptors become the job's standard streams: answer with the process id of the job's
    process, when it has ended with its exit status (a negative number is a signal), and, once it is told to reap it,
    with zero."""
    control, errors = socket.socket(fileno=os.dup(0)), os.dup(2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # The worker ends this process, by closing the socket, when its jobs have ended.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        data, streams, _, _ = socket.recv_fds(control, MAX_REQUEST, 3)
        if not data:
            return
        request = json.loads(data)
        # If the import ends this process, the job's log says how.
        os.dup2(streams[2], 2)
        with _ending_with(control):
            load(request["job"])
        forkable = may_fork()
        pid = os.fork()
        if pid == 0:
            control.close()
            os.close(errors)
            _run(request, streams, forkable)
        os.dup2(errors, 2)
        for stream in streams:
            os.close(stream)
        try:
            control.sendall(NUMBER.pack(pid))
            # Unreaped, so that its number stays taken and its group can still be killed.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert ended is not None
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            control.sendall(NUMBER.pack(status))
            control.recv(1)
            os.waitpid(pid, 0)
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


def load(job: str) -> None:
    """Import the module of ``job``. If that fails it fails again in the job's process, which tells."""
    # Apple's libraries do not survive a fork.
    if sys.platform != "darwin":
        with suppress(Exception, SystemExit):
            import_module(job.partition(":")[0])
    # Collecting would write to, and so copy, the pages that processes share.
    gc.collect()
    gc.freeze()


def may_fork() -> bool:
    """Whether no import uses a device or threads."""
    files = map(os.path.realpath, Path("/proc/self/fd").glob("*"))
    return threading.active_count() == 1 and not any(file.startswith(DEVICES) for file in files)


def _run(request: Mapping[str, str], streams: Sequence[int], forkable: bool) -> None:
    """Be the process of a job; does not return."""
    try:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
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


def serve(request: Mapping[str, str], ready: int) -> None:
    """Serve the RPC of the job's kind until standard input ends; the descriptor ``ready`` is told when it does."""
    kind_name, path = request["kind"], Path(request["socket"])
    logs.configure("child")
    signal.signal(signal.SIGTERM, lambda *_: lifetime.stopping.set())
    if kind_name not in KINDS:
        raise SystemExit(f"this version knows no kind {kind_name!r}")
    kind = replace(KINDS[kind_name], job=request["job"])
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=CHANNEL_OPTIONS)
    add_to_server(server, kind, request_type(kind))
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

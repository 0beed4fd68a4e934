"""A job's own process: serves one system's gRPC service on a unix socket, for the supervisor that started it.

It knows no database and no broker. Standard input is held open by the supervisor: when it ends, so does this process
and whatever it started. ``ready`` on standard output says that it answers; after that, standard output goes where
standard error does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import grpc

from ethogram.rpc import CHANNEL_OPTIONS
from services.runtime import lifetime, logs
from services.runtime.servicer import JOB_THREAD

# What a cancelled job has to clean up in.
LEAVE_SECONDS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.child", description=__doc__)
    parser.add_argument("--servicer", required=True, help="module:function that adds the servicer to a gRPC server")
    parser.add_argument("--socket", required=True, type=Path, help="path of the unix socket to serve on")
    arguments = parser.parse_args()
    ready = os.dup(1)
    os.dup2(2, 1)
    logs.configure("child")
    signal.signal(signal.SIGTERM, lambda *_: lifetime.stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=CHANNEL_OPTIONS)
    module, function = arguments.servicer.split(":")
    getattr(import_module(module), function)(server)
    server.add_insecure_port(f"unix:{arguments.socket}")
    server.start()
    leave = threading.Event()
    lifetime.exit_on_eof(leave.set)
    os.write(ready, b"ready\n")
    os.close(ready)

    leave.wait()
    _leave(server, arguments.socket)


def _leave(server: grpc.Server, socket: Path) -> None:
    """Cancel the run, let it clean up for a moment, and end with everything that it started."""
    # Even if this thread no longer gets its turn.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(LEAVE_SECONDS) + 2)
    server.stop(None)
    for thread in threading.enumerate():
        if thread.name == JOB_THREAD:
            thread.join(LEAVE_SECONDS)
    with suppress(OSError):
        shutil.rmtree(socket.parent)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()

"""A job's own process: serves the RPC of its kind on a unix socket, for the supervisor that started it.

It knows no database and no broker. The supervisor holds its standard input open: when that ends, so do this process
and whatever it started. It writes ``ready`` to standard output once it serves; after that, standard output goes where
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
from dataclasses import replace
from pathlib import Path

import grpc

from ethogram.rpc import CHANNEL_OPTIONS
from ethogram.specs.kinds import KINDS
from services.kinds import request_type
from services.runtime import lifetime, logs
from services.runtime.servicer import JOB_THREAD, add_to_server

# Time that a cancelled job has to clean up.
LEAVE_SECONDS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.child", description=__doc__)
    parser.add_argument("--kind", required=True, choices=KINDS, help="kind of job to serve")
    parser.add_argument("--job", required=True, help="module:function that runs the job")
    parser.add_argument("--socket", required=True, type=Path, help="path of the unix socket to serve on")
    arguments = parser.parse_args()
    ready = os.dup(1)
    os.dup2(2, 1)
    logs.configure("child")
    signal.signal(signal.SIGTERM, lambda *_: lifetime.stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=CHANNEL_OPTIONS)
    kind = replace(KINDS[arguments.kind], job=arguments.job)
    add_to_server(server, kind, request_type(kind))
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

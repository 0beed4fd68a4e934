"""Runs a program that does not watch its parent, and ends it when the parent is gone.

``python guard.py PROGRAM ARGUMENT...``: the program gets SIGTERM when this process's standard input reaches its end
(whoever held the other end of the pipe died) or when this process gets SIGTERM. On Linux the program also dies with
this process, should that be killed. Imports little, so that it costs little memory and time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` until it ends; its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)  # noqa: PLW1509 (no thread is running yet)

    def end(*_: object) -> None:
        child.terminate()
        timer = threading.Timer(GRACE_SECONDS, child.kill)
        timer.daemon = True
        timer.start()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    threading.Thread(target=watch, daemon=True).start()
    return child.wait()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

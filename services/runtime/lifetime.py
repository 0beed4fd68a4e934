"""When a process must leave: it was asked to, or its parent is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

stopping = threading.Event()
"""Set when this process was asked to leave (SIGTERM); a job then checkpoints at its next opportunity and ends."""


def exit_on_eof(stop: Callable[[], None]) -> None:
    """Call ``stop`` once standard input reaches its end, from a thread.

    Whoever starts a process keeps the other end of that pipe open and never writes: the kernel closes it whatever way
    the parent dies, ``kill -9`` included.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        stop()

    threading.Thread(target=watch, name="parent-pipe", daemon=True).start()

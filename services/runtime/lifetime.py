"""When a process must exit: it was asked to, or its parent is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

stopping = threading.Event()
"""Set when this process was asked to exit (SIGTERM); a job then checkpoints at its next opportunity and ends."""


def exit_on_eof(stop: Callable[[], None]) -> None:
    """Call ``stop`` once standard input reaches its end, from a thread.

    The parent keeps the other end of that pipe open and never writes; the kernel closes it however the parent dies,
    ``kill -9`` included.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        stop()

    threading.Thread(target=watch, name="parent-pipe", daemon=True).start()

"""How a process of the platform starts, and when it must exit: it was asked to, or its parent is gone."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ethogram.errors import EthogramError
from services.runtime import logs
from services.runtime.settings import ProcessSettings

S = TypeVar("S", bound=ProcessSettings)

stopping = threading.Event()
"""Set when this process was asked to exit (SIGTERM); a job then checkpoints at its next opportunity and ends."""


def run_process(
    module: str,
    name: str,
    settings: type[S],
    serve: Callable[[S], None],
    leave: Callable[[], None] | None = None,
    *,
    failure: int = 1,
) -> None:
    """Run ``python -m module``, whose logs carry ``name``: ``serve`` the settings until it returns.

    A signal calls ``leave``, if ``serve`` does not handle signals itself. With ``--parent-pipe`` the end of standard
    input counts as SIGTERM. An :class:`EthogramError` is printed, and the process exits with status ``failure``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"The platform's {name} process. Its settings are the variables ETHOGRAM_*.",
        epilog=f"example: ETHOGRAM_STATE=runs/state python -m {module}",
    )
    parser.add_argument("--parent-pipe", action="store_true", help="exit when standard input closes")
    arguments = parser.parse_args()
    logs.configure(name)
    if leave is not None:
        on_signal = leave
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: on_signal())
    try:
        config = settings.read()
        logs.configure(name, config.log_level)
        if arguments.parent_pipe:
            exit_on_eof(lambda: os.kill(os.getpid(), signal.SIGTERM))
        serve(config)
    except EthogramError as error:
        sys.stderr.write(f"{name}: {error.message}\n")
        raise SystemExit(failure) from None


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

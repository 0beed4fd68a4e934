"""What the worker and the reconciler do at their start: options, logs, settings, signals."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from ethogram.errors import EthogramError
from services.runtime import lifetime, logs
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)


def run_process(module: str, name: str, serve: Callable[[WorkerSettings], None], leave: Callable[[], None]) -> None:
    """Run ``python -m module``, whose logs carry ``name``: ``serve`` the settings until it returns.

    A signal, and with ``--parent-pipe`` the end of standard input, calls ``leave``. Exits with status 2 on an
    :class:`EthogramError`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=f"The {name} of the platform.")
    parser.add_argument("--parent-pipe", action="store_true", help="exit when standard input closes")
    arguments = parser.parse_args()
    logs.configure(name)

    def on_signal(*_: Any) -> None:
        leave()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        config = WorkerSettings.read()
        logs.configure(name, config.log_level)
        if arguments.parent_pipe:
            lifetime.exit_on_eof(lambda: os.kill(os.getpid(), signal.SIGTERM))
        serve(config)
    except EthogramError as error:
        logger.critical(error.message)
        raise SystemExit(2) from None

"""``python -m services.inference``: the always-on inference server of one device."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import suppress

from ethogram.errors import EthogramError
from services.inference.settings import InferenceSettings
from services.runtime.lifetime import exit_on_eof
from services.runtime.logs import configure


async def serve(settings: InferenceSettings, parent_pipe: bool) -> None:
    """Serve until SIGTERM, SIGINT, or the end of standard input if ``parent_pipe``."""
    # Here, so that a wrong setting is told before torch is imported.
    from services.inference.server import InferenceServer

    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    if parent_pipe:

        def parent_gone() -> None:
            with suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(leave.set)

        exit_on_eof(parent_gone)
    server = InferenceServer(settings)
    address = await server.start()
    record = settings.state / "inference.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"address": address, "pid": os.getpid()}))
    sys.stdout.write(f"inference listens on {address}\n")
    sys.stdout.flush()
    try:
        await leave.wait()
    finally:
        record.unlink(missing_ok=True)
        await server.stop()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="services.inference", description=__doc__)
    parser.add_argument("--parent-pipe", action="store_true", help="leave when standard input ends")
    arguments = parser.parse_args()
    configure("inference")
    try:
        settings = InferenceSettings.read()
        configure("inference", settings.log_level)
        asyncio.run(serve(settings, arguments.parent_pipe))
    except EthogramError as error:
        sys.stderr.write(f"inference: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

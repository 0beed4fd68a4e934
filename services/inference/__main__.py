"""``python -m services.inference``: the always-on inference server of one device."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from services.inference.settings import InferenceSettings
from services.runtime.lifetime import run_process


async def serve(settings: InferenceSettings) -> None:
    """Serve until SIGTERM or SIGINT."""
    # Imported here, so that a wrong setting is reported before torch is loaded.
    from services.inference.server import InferenceServer

    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    server = InferenceServer(settings)
    address = await server.start()
    record = settings.folder.inference
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"address": address, "pid": os.getpid()}), encoding="utf-8")
    sys.stdout.write(f"inference listens on {address}\n")
    sys.stdout.flush()
    try:
        await leave.wait()
    finally:
        record.unlink(missing_ok=True)
        await server.stop()


if __name__ == "__main__":
    run_process("services.inference", "inference", InferenceSettings, lambda settings: asyncio.run(serve(settings)))

"""A job module that starts a thread when it is imported, and with it cannot be forked."""

import threading
import time
from typing import Any

from ethogram.specs.generation import GenerationSpec
from services.runtime.run import Run

time.sleep(0.2)
_stop = threading.Event()
threading.Thread(target=_stop.wait, daemon=True, name="of the import").start()


def run(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Tells which threads there are."""
    return {"threads": [thread.name for thread in threading.enumerate()]}

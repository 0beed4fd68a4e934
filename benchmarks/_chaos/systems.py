"""The arena's jobs; the points of a job's process are here.

A job's process does not see its worker's environment: it finds the folder of faults above its current folder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks._chaos import points, science
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec
from services.artifacts.backends import LocalBackend
from services.runtime.run import Run


def _arm() -> None:
    folder = next(above / "faults" for above in Path.cwd().parents if (above / "faults").is_dir())
    write = LocalBackend.write

    def wrapped(self: LocalBackend, path: str, data: bytes) -> None:
        # The blobs are there, the manifest is not.
        if path.startswith("manifests/") and points.take(folder, "in the middle of an upload"):
            points.die()
        if points.take(folder, "child hangs"):
            time.sleep(3600)
        write(self, path, data)

    LocalBackend.write = wrapped  # type: ignore[method-assign]
    points.full_store(folder, "child: store full")


def generation(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Jobs that count, and parents of such."""
    _arm()
    return science.work(spec, run)


def crossmodal(spec: CrossmodalSpec, run: Run) -> dict[str, Any]:
    """Jobs that use what another made."""
    _arm()
    return science.consume(spec, run)

"""Metrics of a run, written as they come: JSON lines, and TensorBoard scalars."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from services.runtime.scalars import ScalarsFile

METRICS, STATE = "metrics.jsonl", "state"


class MetricsWriter:
    """Writes ``metrics.jsonl``, one line ``{"stage", "step", name: number, ...}`` per call, and a TensorBoard event
    file with a scalar ``stage/name`` for each number. JSON has no NaN: a number that is not finite is ``null`` in the
    lines and missing from the scalars."""

    def __init__(self, folder: Path, resume: Path | None = None) -> None:
        """Replace the metrics in ``folder``; with ``resume``, the folder of a checkpoint, by those up to then."""
        self.folder, self.file = folder, folder / METRICS
        self._files: tuple[IO[str], ScalarsFile] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for file in (self.file, *folder.glob("events.out.tfevents*")):
            file.unlink(missing_ok=True)
        if resume is not None and (resume / METRICS).exists():
            shutil.copyfile(resume / METRICS, self.file)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of one step."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        lines, scalars = self._files or self._open()
        lines.write(json.dumps({"stage": stage, "step": step, **finite}) + "\n")
        scalars.add(stage, step, finite)

    def checkpoint(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Make ``folder`` a checkpoint: what ``write`` puts into ``folder/state``, and the metrics so far."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / STATE).mkdir(parents=True)
        write(folder / STATE)
        if self.file.exists():
            shutil.copyfile(self.file, folder / METRICS)

    def close(self) -> None:
        """Complete the files."""
        if self._files is None and self.file.exists():
            self._open()
        for file in self._files or ():
            file.close()

    def _open(self) -> tuple[IO[str], ScalarsFile]:
        """Open the files; the event file begins with the metrics of earlier attempts."""
        earlier = self.file.read_bytes().splitlines() if self.file.exists() else []
        self._files = lines, scalars = self.file.open("a", buffering=1), ScalarsFile(self.folder)
        for row in map(json.loads, earlier):
            # Checkpoints of earlier versions have lines without a stage.
            scalars.add(row.pop("stage", ""), row.pop("step"), row)
        return lines, scalars

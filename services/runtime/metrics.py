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
        self._lines: IO[str] | None = None
        self._scalars: ScalarsFile | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for file in (self.file, *folder.glob("events.out.tfevents*")):
            file.unlink(missing_ok=True)
        if resume is not None and (resume / METRICS).exists():
            shutil.copyfile(resume / METRICS, self.file)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of one step."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        if self._lines is None:
            self._lines = self.file.open("a", buffering=1)
        self._lines.write(json.dumps({"stage": stage, "step": step, **finite}) + "\n")
        if self._scalars is None:
            self._scalars = self._begin_scalars()
        else:
            _add(self._scalars, stage, step, finite)

    def checkpoint(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Make ``folder`` a checkpoint: what ``write`` puts into ``folder/state``, and the metrics so far."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / STATE).mkdir(parents=True)
        write(folder / STATE)
        if self.file.exists():
            shutil.copyfile(self.file, folder / METRICS)

    def close(self) -> None:
        """Complete the files."""
        if self._scalars is None and self.file.exists():
            self._scalars = self._begin_scalars()
        if self._lines is not None:
            self._lines.close()
        if self._scalars is not None:
            self._scalars.close()

    def _begin_scalars(self) -> ScalarsFile:
        """An event file with all metrics so far: those of earlier attempts are in it once."""
        scalars = ScalarsFile(self.folder)
        for line in self.file.read_text().splitlines():
            row = json.loads(line)
            # Checkpoints of earlier versions have lines without a stage.
            _add(scalars, row.pop("stage", ""), row.pop("step"), row)
        return scalars


def _add(scalars: ScalarsFile, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
    for name, value in metrics.items():
        if value is not None:
            scalars.add(f"{stage}/{name}" if stage else name, step, value)

"""Metrics of a run, written as they come: JSON lines, and TensorBoard scalars."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from services.runtime.scalars import ScalarsFile, append

METRICS, STATE = "metrics.jsonl", "state"
EVENTS = "events.out.tfevents*"
_logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes ``metrics.jsonl``, one line ``{"stage", "step", name: number, ...}`` per call, and a TensorBoard event
    file with a scalar ``stage/name`` for each number. JSON has no NaN: a number that is not finite is ``null`` in the
    lines and missing from the scalars.

    A file that cannot be written, e.g. on a full disk, ends there: ``warn`` is called once, and the run continues.
    """

    def __init__(
        self, folder: Path, resume: Path | None = None, warn: Callable[[str], object] = _logger.warning
    ) -> None:
        """Replace the metrics in ``folder``; with ``resume``, the folder of a checkpoint, by those up to then."""
        self.folder, self.file, self._warn = folder, folder / METRICS, warn
        self._lines: BinaryIO | None = None
        self._scalars: ScalarsFile | None = None
        self._failed: set[str] = set()
        """Files that cannot be written any more."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in (self.file, *folder.glob(EVENTS)):
            file.unlink(missing_ok=True)
        if resume is not None and (resume / METRICS).exists():
            shutil.copyfile(resume / METRICS, self.file)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of one step."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        # First, as a new event file begins with the lines that are there.
        self._attempt("the TensorBoard events", lambda: self._events().add(stage, step, finite))
        self._attempt(METRICS, lambda: self._add_line({"stage": stage, "step": step, **finite}))

    def checkpoint(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Make ``folder`` a checkpoint: what ``write`` puts into ``folder/state``, and the metrics so far."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / STATE).mkdir(parents=True)
        write(folder / STATE)
        if self.file.exists():
            shutil.copyfile(self.file, folder / METRICS)

    def close(self) -> None:
        """Complete the files."""
        if self.file.exists():
            self._attempt("the TensorBoard events", self._events)
        for file in (self._lines, self._scalars):
            if file is not None:
                file.close()

    def _add_line(self, row: Mapping[str, Any]) -> None:
        self._lines = self._lines or self.file.open("ab", buffering=0)
        append(self._lines, json.dumps(row).encode() + b"\n")

    def _events(self) -> ScalarsFile:
        """The event file; it begins with the metrics of earlier attempts."""
        if self._scalars is None:
            earlier: list[dict[str, Any]] = []
            with suppress(FileNotFoundError), self.file.open(encoding="utf-8") as lines:
                earlier = [json.loads(line) for line in lines]
            self._scalars = ScalarsFile(self.folder)
            for row in earlier:
                # Checkpoints of earlier versions have lines without a stage.
                self._scalars.add(row.pop("stage", ""), row.pop("step"), row)
        return self._scalars

    def _attempt(self, what: str, write: Callable[[], object]) -> None:
        if what in self._failed:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            self._failed.add(what)
            reason = getattr(error, "strerror", None) or error
            self._warn(f"{what} cannot be written ({reason}); the run continues without more of them")

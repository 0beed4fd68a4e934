"""A run in this process: progress on the terminal or in a log, and artifacts as folders."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from ethogram.progress import StageDisplay
from services.runtime.metrics import STATE, MetricsWriter
from services.runtime.run import Run

CHECKPOINT = "checkpoint"


class ConsoleRun(Run):
    """Shows each stage as a bar, or in a log as a line now and then. Use it as a context manager, so that bars end.

    With ``output`` it keeps metrics there (see :class:`MetricsWriter`), artifacts as folders ``output/<name>``, and a
    checkpoint every ``checkpoint_seconds`` and on Ctrl-C. It resumes from one that is there.
    """

    def __init__(
        self,
        output: Path | None = None,
        device: str = "cpu",
        inputs: Mapping[str, Path] = MappingProxyType({}),
        console: Console | None = None,
        *,
        checkpoint_seconds: float = math.inf,
        id: str = "",
    ) -> None:
        self.id, self.device, self.inputs, self._output = id, device, inputs, output
        self._display = StageDisplay(console)
        self.artifacts: set[tuple[str, str]] = set()
        """Name and type of each artifact."""
        self.unfinished: set[str] = set()
        """Artifacts that are being written where they are kept."""
        self._seconds, self._next = checkpoint_seconds, time.monotonic() + checkpoint_seconds
        # The current stage, and whether it keeps checkpoints.
        self._stage, self._keeps = "", False
        self._leaving = False
        self._handler: Any = None
        self._metrics: MetricsWriter | None = None
        if output is not None:
            checkpoint = output / CHECKPOINT
            self.resume = checkpoint / STATE if checkpoint.exists() else None
            self._metrics = MetricsWriter(output, checkpoint, partial(self.log, level="warning"))

    def __enter__(self) -> ConsoleRun:
        self._display.__enter__()
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def _interrupted(self, *_: object) -> None:
        # A stage without checkpoints ends at once, and so does what is interrupted twice.
        if self._leaving or not self._keeps:
            raise KeyboardInterrupt
        self._leaving = True
        self.log("Ending at the next checkpoint; press Ctrl-C again to end at once.")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._display.__exit__()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._metrics is not None:
            self._metrics.close()
            if kind is None:
                for folder in checkpoints(self._metrics.folder):
                    remove(folder)

    def checkpoint_due(self) -> bool:
        self._keeps = self._metrics is not None
        return self._keeps and (self._leaving or time.monotonic() >= self._next)

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self._metrics is None:
            return
        checkpoint, fresh, old = checkpoints(self._metrics.folder)
        self._metrics.checkpoint(fresh, write)
        # By renaming: a process that is killed meanwhile must not leave a part of a checkpoint.
        remove(old)
        if checkpoint.exists():
            checkpoint.rename(old)
        fresh.rename(checkpoint)
        remove(old)
        self._next = time.monotonic() + self._seconds
        if self._leaving:
            raise KeyboardInterrupt

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self._display.stage(name, total, unit)
        self._stage, self._keeps = name, False

    def advance(self, done: int) -> None:
        self._display.advance(done)

    def metric(self, step: int, **values: float) -> None:
        metrics = {name: float(value) for name, value in values.items()}
        self._display.metrics(metrics)
        if self._metrics is not None:
            self._metrics.write(self._stage, step, metrics)

    def log(self, message: str, level: str = "info") -> None:
        self._display.log(message, level)

    @contextmanager
    def output_folder(self, name: str) -> Iterator[Path]:
        if self._output is None:
            with super().output_folder(name) as folder:
                yield folder
            return
        self.unfinished.add(name)
        yield self._output / name

    def artifact(self, name: str, type: str, folder: Path) -> None:
        self.artifacts.add((name, type))
        if self._output is None:
            return
        kept = self._output / name
        if folder.resolve() != kept.resolve():
            shutil.copytree(folder, kept, dirs_exist_ok=True)
        self.unfinished.discard(name)


def checkpoints(output: Path) -> tuple[Path, Path, Path]:
    """The checkpoint, the one that is being written, and the one that it replaces."""
    return output / CHECKPOINT, output / f"{CHECKPOINT}.new", output / f"{CHECKPOINT}.old"


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

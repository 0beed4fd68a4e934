"""A run in this process: progress on the terminal or in a log, and artifacts as folders."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from rich.console import Console

from ethogram.progress import StageDisplay
from services.runtime.metrics import STATE, MetricsWriter
from services.runtime.run import Run

CHECKPOINT = "checkpoint"


class ConsoleRun(Run):
    """Shows each stage as a bar, or in a log as a line now and then. Keeps artifacts as folders ``output/<name>``, or
    where ``places`` says, and metrics in ``output``; see :class:`MetricsWriter`.

    Use it as a context manager, so that the bars end with it. With ``checkpoint_seconds`` it also keeps a checkpoint in
    ``output``, that often and on Ctrl-C, and resumes from one that is there.
    """

    def __init__(
        self,
        output: Path | None = None,
        device: str = "cpu",
        inputs: Mapping[str, Path] = MappingProxyType({}),
        console: Console | None = None,
        *,
        checkpoint_seconds: float | None = None,
        places: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.device, self.inputs, self._output, self._places = device, inputs, output, places
        self.unfinished: set[str] = set()
        """Artifacts that are being written where they are kept."""
        self._seconds = checkpoint_seconds
        self._next = time.monotonic() + (checkpoint_seconds or 0.0)
        # The current stage, and whether it keeps checkpoints.
        self._stage, self._keeps = "", False
        self._leaving = False
        self._handler: Any = None
        self._metrics: MetricsWriter | None = None
        if output is not None:
            checkpoint = output / CHECKPOINT
            resumes = checkpoint_seconds is not None and checkpoint.exists()
            self._metrics = MetricsWriter(output, checkpoint if resumes else None)
            self.resume = checkpoint / STATE if resumes else None
        self._display = StageDisplay(console)

    def __enter__(self) -> ConsoleRun:
        self._display.__enter__()
        if self._seconds is not None and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def _interrupted(self, *_: object) -> None:
        # A stage without checkpoints ends at once, and so does what is interrupted twice.
        if self._leaving or not self._keeps:
            raise KeyboardInterrupt
        self._leaving = True
        self.log("Ending at the next checkpoint; press Ctrl-C again to end at once.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.__exit__()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._metrics is not None:
            self._metrics.close()
        if self._output is not None and kind is None:
            for suffix in ("", ".new", ".old"):
                shutil.rmtree(self._output / f"{CHECKPOINT}{suffix}", ignore_errors=True)

    def checkpoint_due(self) -> bool:
        if self._seconds is None or self._metrics is None:
            return False
        self._keeps = True
        return self._leaving or time.monotonic() >= self._next

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self._output is None or self._seconds is None or self._metrics is None:
            return
        checkpoint, fresh, old = (self._output / f"{CHECKPOINT}{suffix}" for suffix in ("", ".new", ".old"))
        self._metrics.checkpoint(fresh, write)
        # By renaming: a process that is killed meanwhile must not leave a part of a checkpoint.
        shutil.rmtree(old, ignore_errors=True)
        if checkpoint.exists():
            checkpoint.rename(old)
        fresh.rename(checkpoint)
        shutil.rmtree(old, ignore_errors=True)
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
        yield self._places.get(name, self._output / name)

    def artifact(self, name: str, type: str, folder: Path) -> None:
        if self._output is None:
            return
        kept = self._places.get(name, self._output / name)
        if folder.resolve() != kept.resolve():
            shutil.copytree(folder, kept, dirs_exist_ok=True)
        self.unfinished.discard(name)

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from services.runtime.metrics import STATE, MetricsWriter
from services.runtime.run import Run

CHECKPOINT = "checkpoint"
LINE_SECONDS = 15.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


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
        """Artifacts that are being written in their place."""
        self._seconds = checkpoint_seconds
        self._next = time.monotonic() + (checkpoint_seconds or 0.0)
        # Of the present stage: its name, whether it keeps checkpoints, when its next line is due, and its metrics.
        self._stage, self._keeps, self._line, self._shown_metrics = "", False, 0.0, ""
        self._leaving = False
        self._handler: Any = None
        self._metrics: MetricsWriter | None = None
        if output is not None:
            checkpoint = output / CHECKPOINT
            resumes = checkpoint_seconds is not None and checkpoint.exists()
            self._metrics = MetricsWriter(output, checkpoint if resumes else None)
            self.resume = checkpoint / STATE if resumes else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=(console := console or Console(stderr=True)),
            disable=not console.is_terminal,
        )
        # As many as fit beside the bar.
        self._shown = max(1, (console.width - 60) // 20)
        self._task: TaskID | None = None

    def __enter__(self) -> ConsoleRun:
        self._progress.start()
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
        self._progress.stop()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._metrics is not None:
            self._metrics.close()
        if self._output is not None and kind is None:
            shutil.rmtree(self._output / CHECKPOINT, ignore_errors=True)

    def checkpoint_due(self) -> bool:
        if self._seconds is None or self._output is None:
            return False
        self._keeps = True
        return self._leaving or time.monotonic() >= self._next

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self._output is None or self._seconds is None or self._metrics is None:
            return
        checkpoint, fresh = self._output / CHECKPOINT, self._output / f"{CHECKPOINT}.new"
        self._metrics.checkpoint(fresh, write)
        shutil.rmtree(checkpoint, ignore_errors=True)
        fresh.rename(checkpoint)
        self._next = time.monotonic() + self._seconds
        if self._leaving:
            raise KeyboardInterrupt

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self._task = self._progress.add_task(name, total=total, unit=unit, metrics="")
        self._stage, self._keeps, self._line, self._shown_metrics = name, False, time.monotonic() + LINE_SECONDS, ""

    def advance(self, done: int) -> None:
        if self._task is None:
            return
        self._progress.update(self._task, completed=done)
        stage = self._progress.tasks[self._task]
        if self._progress.disable and (stage.finished or time.monotonic() >= self._line):
            self._line = time.monotonic() + LINE_SECONDS
            line = f"{stage.description}: {done} of {stage.total:.0f} {stage.fields['unit']} {self._shown_metrics}"
            self.log(line.rstrip())

    def metric(self, step: int, **values: float) -> None:
        metrics = {name: float(value) for name, value in values.items()}
        if self._task is not None:
            shown = list(metrics.items())[: self._shown]
            self._shown_metrics = " ".join(f"{name} {value:.3g}" for name, value in shown)
            self._progress.update(self._task, metrics=self._shown_metrics)
        if self._metrics is not None:
            self._metrics.write(self._stage, step, metrics)

    def log(self, message: str, level: str = "info") -> None:
        style = "yellow" if level == "warning" else None
        self._progress.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def output_folder(self, name: str) -> Iterator[Path]:
        if self._output is None:
            with super().output_folder(name) as folder:
                yield folder
            return
        self.unfinished.add(name)
        yield self._place(name, self._output)

    def artifact(self, name: str, type: str, folder: Path) -> None:
        if self._output is None:
            return
        place = self._place(name, self._output)
        if folder.resolve() != place.resolve():
            shutil.copytree(folder, place, dirs_exist_ok=True)
        self.unfinished.discard(name)

    def _place(self, name: str, output: Path) -> Path:
        return self._places.get(name, output / name)

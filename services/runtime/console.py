"""A run for a terminal or a log: progress, and artifacts as folders. For using a system as a library."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from services.runtime.run import Run
from services.runtime.scalars import write_scalars

METRICS, CHECKPOINT = "metrics.jsonl", "checkpoint"
LINE_SECONDS = 15.0
"""Between lines of progress where there is no terminal to draw a bar on."""


class ConsoleRun(Run):
    """Shows each stage as a bar, in a log as a line now and then; keeps artifacts below ``output/<name>/`` and metrics
    in ``output/metrics.jsonl`` and a TensorBoard event file.

    Use it as a context manager, so that the bars end with it. With ``checkpoint_seconds`` it keeps a checkpoint in
    ``output`` too, as often and when Ctrl-C is typed, and goes on from one that is there.
    """

    def __init__(
        self,
        output: Path | None = None,
        device: str = "cpu",
        inputs: Mapping[str, Path] = MappingProxyType({}),
        console: Console | None = None,
        *,
        checkpoint_seconds: float | None = None,
    ) -> None:
        self.device, self.inputs, self._output = device, inputs, output
        self._seconds, self._next = checkpoint_seconds, 0.0
        # Of the present stage: whether it keeps checkpoints, when its next line is due, and its metrics.
        self._keeps, self._line, self._metrics = False, 0.0, ""
        self._leaving = False
        self._before: Any = None
        if output is not None:
            self._begin(output)
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
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def _interrupted(self, *_: object) -> None:
        # A stage without checkpoints ends at once, and so does what is interrupted twice.
        if self._leaving or not self._keeps:
            raise KeyboardInterrupt
        self._leaving = True
        self.log("ending at the next checkpoint; Ctrl-C again ends at once")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._output is None:
            return
        if (self._output / METRICS).exists():
            write_scalars(self._output / METRICS, self._output)
        if kind is None:
            shutil.rmtree(self._output / CHECKPOINT, ignore_errors=True)

    def _begin(self, output: Path) -> None:
        """Metrics are those of this run alone, and of what it goes on from."""
        output.mkdir(parents=True, exist_ok=True)
        for file in (output / METRICS, *output.glob("events.out.tfevents*")):
            file.unlink(missing_ok=True)
        kept = output / CHECKPOINT
        if self._seconds is not None:
            self._next = time.monotonic() + self._seconds
            if kept.exists():
                self.resume = kept / "state"
                if (kept / METRICS).exists():
                    shutil.copyfile(kept / METRICS, output / METRICS)

    def checkpoint_due(self) -> bool:
        if self._seconds is None or self._output is None:
            return False
        self._keeps = True
        return self._leaving or time.monotonic() >= self._next

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if self._output is None or self._seconds is None:
            return
        kept, fresh = self._output / CHECKPOINT, self._output / f"{CHECKPOINT}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        (fresh / "state").mkdir(parents=True)
        write(fresh / "state")
        if (self._output / METRICS).exists():
            shutil.copyfile(self._output / METRICS, fresh / METRICS)
        shutil.rmtree(kept, ignore_errors=True)
        fresh.rename(kept)
        self._next = time.monotonic() + self._seconds
        if self._leaving:
            raise KeyboardInterrupt

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self._task = self._progress.add_task(name, total=total, unit=unit, metrics="")
        self._keeps, self._line, self._metrics = False, time.monotonic() + LINE_SECONDS, ""

    def advance(self, done: int) -> None:
        if self._task is None:
            return
        self._progress.update(self._task, completed=done)
        stage = self._progress.tasks[self._task]
        if self._progress.disable and (stage.finished or time.monotonic() >= self._line):
            self._line = time.monotonic() + LINE_SECONDS
            line = f"{stage.description}: {done} of {stage.total:.0f} {stage.fields['unit']} {self._metrics}"
            self._progress.console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)

    def metric(self, step: int, **values: float) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        if self._task is not None:
            shown = list(numbers.items())[: self._shown]
            self._metrics = " ".join(f"{name} {value:.3g}" for name, value in shown)
            self._progress.update(self._task, metrics=self._metrics)
        if self._output is not None:
            line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}
            with (self._output / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def log(self, message: str, level: str = "info") -> None:
        self._progress.console.print(
            message, style="yellow" if level == "warning" else None, markup=False, highlight=False
        )

    def artifact(self, name: str, type: str, folder: Path) -> None:
        if self._output is not None and folder.resolve() != (self._output / name).resolve():
            shutil.copytree(folder, self._output / name, dirs_exist_ok=True)

"""A run for a terminal: progress bars, and artifacts as folders. For using a system as a library."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from services.runtime.run import Run
from services.runtime.scalars import write_scalars

METRICS, CHECKPOINT = "metrics.jsonl", "checkpoint"


class ConsoleRun(Run):
    """Shows each stage as a bar; keeps artifacts below ``output/<name>/`` and metrics in ``output/metrics.jsonl``
    and a TensorBoard event file.

    Use it as a context manager, so that the bars end with it. With ``checkpoint_seconds`` it keeps a checkpoint in
    ``output`` too, as often, and goes on from one that is there.
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
        )
        # As many as fit beside the bar.
        self._shown = max(1, (console.width - 60) // 20)
        self._task: TaskID | None = None

    def __enter__(self) -> ConsoleRun:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
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
        return self._seconds is not None and self._output is not None and time.monotonic() >= self._next

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

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self._task = self._progress.add_task(name, total=total, unit=unit, metrics="")

    def advance(self, done: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def metric(self, step: int, **values: float) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        if self._task is not None:
            shown = list(numbers.items())[: self._shown]
            self._progress.update(self._task, metrics=" ".join(f"{name} {value:.3g}" for name, value in shown))
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

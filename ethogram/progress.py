"""Progress on standard error, of jobs in this process and of those that are watched."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ethogram.resources import Event

LINE_SECONDS = 15.0
"""Seconds between lines of progress where there is no terminal for a bar."""
MOST_BARS = 12
"""Stages whose bars stay on the terminal; the earliest make room."""


class StageDisplay:
    """A bar for each stage, with its latest metrics; without a terminal, a line now and then. Use it as a context
    manager, so that the bars end with it."""

    def __init__(self, console: Console | None = None, prefix: str = "") -> None:
        """``prefix``: put before each stage and message."""
        self._console, self._prefix = console or Console(stderr=True, emoji=False), prefix
        self.terminal = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            console=self._console,
            disable=not self.terminal,
        )
        # As many as fit beside the bar, or in a line of a log.
        self._shown = max(1, ((self._console.width if self.terminal else 200) - 60) // 20)
        self._task: TaskID | None = None
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, name: str, total: int | None, unit: str) -> None:
        """Begin a stage of ``total`` units; None: of an unknown number."""
        for task in self._progress.tasks[: 1 - MOST_BARS]:
            self._progress.remove_task(task.id)
        self._task = self._progress.add_task(self._prefix + name, total=total, unit=unit, metrics="")
        self._next_line = time.monotonic() + LINE_SECONDS

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Show numbers beside the stage."""
        if self._task is not None:
            shown = list(metrics.items())[: self._shown]
            self._progress.update(self._task, metrics=" ".join(f"{name} {value:.3g}" for name, value in shown))

    def advance(self, done: int) -> None:
        """``done`` units of the stage are done."""
        if self._task is None:
            return
        task = self._progress.tasks[-1]
        before = task.completed
        self._progress.update(self._task, completed=done)
        ended = task.finished and done != before
        if not self.terminal and (ended or time.monotonic() >= self._next_line):
            self._next_line = time.monotonic() + LINE_SECONDS
            total = "?" if task.total is None else f"{task.total:.0f}"
            self._print(
                f"{task.description}: {done} of {total} {task.fields['unit']} {task.fields['metrics']}".rstrip()
            )

    def log(self, message: str, level: str = "info") -> None:
        """Print a line above the bars."""
        self._print(self._prefix + message, "yellow" if level == "warning" else None)

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class Watch(StageDisplay):
    """Shows the events of the job that people know as ``name``, as a ``with`` block."""

    def __init__(self, name: str) -> None:
        super().__init__(prefix=f"{name}: ")
        self._stage: str | None = None
        self._total_left = 0
        """Total of a stage that has not been shown to its end, else 0."""

    def event(self, event: Event) -> None:
        """Show one event."""
        data = event.data
        if event.type == "progress":
            done, total = data.get("done", 0), data.get("total") or 0
            if data.get("stage") != self._stage:
                self._fill()
                self._stage = data.get("stage")
                self.stage(str(self._stage), total or None, data.get("unit", ""))
            self.metrics(data.get("metrics") or {})
            self.advance(done)
            self._total_left = total if done < total else 0
        elif event.type == "state":
            if data.get("state") == "SUCCEEDED":
                self._fill()
            if not self.terminal:
                self.log(str(data.get("state", "")))
        elif event.type == "log":
            self.log(str(data.get("message", "")), str(data.get("level", "info")))

    def _fill(self) -> None:
        # Progress is throttled, so the end of a stage is rarely sent.
        if self._total_left:
            self.advance(self._total_left)
        self._total_left = 0

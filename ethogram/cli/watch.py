"""Progress of jobs, drawn from their events on standard error: live bars on a terminal, lines in a log."""

from __future__ import annotations

import sys
from typing import Any, Protocol, Self

from ethogram.resources import Event

_LINE_STEP = 0.25


class Watch(Protocol):
    """Something that is told a job's events, as a ``with`` block."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def event(self, event: Event) -> None:
        """Show one event."""


def watch(name: str) -> Watch:
    """A watch of the job that people know as ``name``."""
    return Bars(name) if sys.stderr.isatty() else Lines(name)


class Bars:
    """One bar for each stage."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        from ethogram.cli.output import console

        self._name = name
        self._console = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TimeElapsedColumn(),
            Remaining(compact=True),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
        )
        self._stage: str | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def event(self, event: Event) -> None:
        """Show one event."""
        data = event.data
        if event.type == "progress":
            if data.get("stage") != self._stage:
                self._fill()
                self._stage = data.get("stage")
                self._task = self._progress.add_task(f"{self._name}: {self._stage}", unit="", numbers="")
            self._progress.update(
                self._task,
                completed=data.get("done", 0),
                total=data.get("total") or None,
                unit=data.get("unit", ""),
                numbers=_numbers(data),
            )
        elif event.type == "state":
            if data.get("state") == "SUCCEEDED":
                self._fill()
        elif event.type == "log":
            self._console.print(f"{self._name}: {data.get('message', '')}", style=_style(data))

    def _fill(self) -> None:
        # The last progress of a stage is rarely sent: it is throttled.
        if self._task is not None:
            task = self._progress.tasks[-1]
            self._progress.update(self._task, completed=task.total or task.completed)


class Lines:
    """A line for each quarter of a stage."""

    def __init__(self, name: str) -> None:
        from ethogram.cli.output import console

        self._name = name
        self._console = console(stderr=True)
        self._stage: str | None = None
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def event(self, event: Event) -> None:
        """Show one event."""
        data = event.data
        if event.type == "progress":
            if data.get("stage") != self._stage:
                self._stage, self._next = data.get("stage"), 0.0
            share = data.get("done", 0) / (data.get("total") or 1)
            if share >= self._next:
                self._next = (share // _LINE_STEP + 1) * _LINE_STEP
                self._say(
                    f"{self._stage} {share:.0%} ({data.get('done')} of {data.get('total')} {data.get('unit', '')})"
                )
        elif event.type == "state":
            self._say(str(data.get("state", "")))
        elif event.type == "log":
            self._say(str(data.get("message", "")))

    def _say(self, text: str) -> None:
        self._console.print(f"{self._name}: {text}")


def _numbers(data: dict[str, Any]) -> str:
    metrics = data.get("metrics") or {}
    return "  ".join(f"{name} {value:.3g}" for name, value in list(metrics.items())[:3])


def _style(data: dict[str, Any]) -> str:
    return "yellow" if data.get("level") == "warning" else "dim"

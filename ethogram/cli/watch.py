"""Progress of jobs, drawn from their events on standard error."""

from __future__ import annotations

from typing import Self

from ethogram.cli.output import console
from ethogram.progress import StageDisplay
from ethogram.resources import Event


class Watch:
    """Shows the events of the job that people know as ``name``, as a ``with`` block."""

    def __init__(self, name: str) -> None:
        self._display = StageDisplay(console(stderr=True), f"{name}: ")
        self._stage: str | None = None
        self._left = 0
        """What is left of the stage when it is not shown to its end: the total, or 0."""

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.__exit__()

    def event(self, event: Event) -> None:
        """Show one event."""
        data = event.data
        if event.type == "progress":
            done, total = data.get("done", 0), data.get("total") or 0
            if data.get("stage") != self._stage:
                self._fill()
                self._stage = data.get("stage")
                self._display.stage(str(self._stage), total or None, data.get("unit", ""))
            self._display.metrics(data.get("metrics") or {})
            self._display.advance(done)
            self._left = total if done < total else 0
        elif event.type == "state":
            if data.get("state") == "SUCCEEDED":
                self._fill()
            if not self._display.terminal:
                self._display.log(str(data.get("state", "")))
        elif event.type == "log":
            self._display.log(str(data.get("message", "")), str(data.get("level", "info")))

    def _fill(self) -> None:
        # Progress is throttled, so the end of a stage is rarely sent.
        if self._left:
            self._display.advance(self._left)
        self._left = 0

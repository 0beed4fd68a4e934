"""Progress of jobs, drawn from their events on standard error."""

from __future__ import annotations

from ethogram.cli.output import console
from ethogram.progress import StageDisplay
from ethogram.resources import Event


class Watch(StageDisplay):
    """Shows the events of the job that people know as ``name``, as a ``with`` block."""

    def __init__(self, name: str) -> None:
        super().__init__(console(stderr=True), f"{name}: ")
        self._stage: str | None = None
        self._rest = 0
        """The total of a stage that is not shown to its end, or 0."""

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
            self._rest = total if done < total else 0
        elif event.type == "state":
            if data.get("state") == "SUCCEEDED":
                self._fill()
            if not self.terminal:
                self.log(str(data.get("state", "")))
        elif event.type == "log":
            self.log(str(data.get("message", "")), str(data.get("level", "info")))

    def _fill(self) -> None:
        # Progress is throttled, so the end of a stage is rarely sent.
        if self._rest:
            self.advance(self._rest)
        self._rest = 0

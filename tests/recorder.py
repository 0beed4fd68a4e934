"""The run that tests give to a job: it records everything, keeps checkpoints when told, and can be interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from services.runtime.run import Run, Stopped


class Interrupted(Exception):
    """The process is gone."""


class Recorder(Run):
    """Records what a run reports, and copies artifacts and checkpoints into ``folder`` where there is one.

    ``keep``: checkpoint once, at this unit of the stage or the first chance after it; ``every``: at every chance.
    ``stop_after``: raise :class:`Stopped` after so many checkpoints; ``fall``: raise :class:`Interrupted` at this unit.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        inputs: Mapping[str, Path] = MappingProxyType({}),
        resume: Path | None = None,
        keep: int | None = None,
        every: bool = False,
        stop_after: int | None = None,
        fall: int | None = None,
    ) -> None:
        self.inputs, self.resume = inputs, resume
        self._folder, self._keep, self._every, self._stop_after, self._fall = folder, keep, every, stop_after, fall
        self.stages: list[tuple[str, int, str]] = []
        self.done: list[int] = []
        self.metrics: dict[int, dict[str, float]] = {}
        self.logs: list[str] = []
        self.levels: list[str] = []
        self.checkpoints: list[Path] = []
        self.artifacts: list[tuple[str, str]] = []
        """Name and type of each."""

    @property
    def stage_names(self) -> list[str]:
        """The stages in their order."""
        return [name for name, *_ in self.stages]

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self.stages.append((name, total, unit))

    def advance(self, done: int) -> None:
        self.done.append(done)
        if done == self._fall:
            raise Interrupted

    def metric(self, step: int, **values: float) -> None:
        self.metrics[step] = values

    def log(self, message: str, level: str = "info") -> None:
        self.logs.append(message)
        self.levels.append(level)

    def checkpoint_due(self) -> bool:
        if self._keep is None or self.checkpoints:
            return self._every
        return bool(self.done) and self.done[-1] >= self._keep

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        if not self.checkpoint_due():
            return
        assert self._folder is not None
        folder = self._folder / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        write(folder)
        self.checkpoints.append(folder)
        if self._stop_after is not None and len(self.checkpoints) >= self._stop_after:
            raise Stopped

    def artifact(self, name: str, type: str, folder: Path) -> None:
        self.artifacts.append((name, type))
        if self._folder is not None:
            shutil.copytree(folder, self._folder / name)

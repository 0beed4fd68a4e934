"""Processes that outlive what started them."""

from __future__ import annotations

import time
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

import psutil


class Orphans:
    """Watches the processes that work in a folder, wherever they hang in the tree of processes."""

    def __init__(self, folder: Path, patience: float) -> None:
        """``patience``: seconds that a process without its parent has to clean up."""
        self._folder, self._patience = folder.resolve(), patience
        self._since: dict[int, float] = {}
        self.found: dict[int, str] = {}
        """Commands of those that stayed longer, by process id."""

    def living(self) -> list[psutil.Process]:
        """All processes that work in the folder."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self._folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def look(self, parents: Container[int | None]) -> None:
        """Record new orphans. ``parents``: process ids whose children are not orphans."""
        living = self.living()
        children = {process.pid for process in living}
        now, since = time.monotonic(), dict[int, float]()
        for process in living:
            with suppress(psutil.Error):
                # As long as a job's process lives, it ends what it has started itself.
                if process.ppid() in parents or process.ppid() in children:
                    continue
                since[process.pid] = self._since.get(process.pid, now)
                if now - since[process.pid] > self._patience:
                    self.found[process.pid] = " ".join(process.cmdline())
        self._since = since

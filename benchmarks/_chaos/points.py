"""Named points at which a process of the arena dies, or one of its calls fails.

The platform has no hooks for faults: the arena's own entry modules wrap its functions. A point is armed by a file of
its name in the arena's folder of faults; the process that removes the file takes the fault, so each happens once.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any

from services.artifacts.backends import LocalBackend

VARIABLE = "CHAOS_FAULTS"
"""Environment variable with the folder of faults."""

POINTS = (
    # A worker dies.
    "bell popped, not recorded",
    "claimed",
    "checkpoint uploaded, not committed",
    "before the terminal commit",
    "after the terminal commit",
    # A gateway, the reconciler, or a job's process dies.
    "submission committed, bell not rung",
    "loss recorded, not told",
    "in the middle of an upload",
    # They live, and something fails.
    "worker: database full",
    "worker: answer of a commit lost",
    "gateway: database full",
    "gateway: answer of a commit lost",
    "gateway: store full",
    "reconciler: database full",
    "reconciler: answer of a commit lost",
    "child: store full",
    "child hangs",
)


def take(folder: Path, name: str) -> bool:
    """Disarm the point; whether it was armed and this caller was the first to disarm it."""
    try:
        (folder / name).unlink()
    except OSError:
        return False
    return True


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(folder: Path, owner: type, method: str, *, before: str = "", after: str = "") -> None:
    """Kill the process before or after a call of ``owner.method`` when that point is armed."""
    function = getattr(owner, method)

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before and take(folder, before):
            die()
        answer = function(*arguments, **options)
        # A claim that finds no job is none.
        if after and answer is not None and take(folder, after):
            die()
        return answer

    setattr(owner, method, wrapped)


def fill_store(folder: Path, name: str) -> None:
    """Make a write to the artifact store find no space when the point is armed."""
    add = LocalBackend.add

    def wrapped(self: Any, source: Path) -> Any:
        if take(folder, name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, source)

    LocalBackend.add = wrapped  # type: ignore[method-assign]


def fail_database(folder: Path, role: str) -> None:
    """Make a write transaction fail, or seem to fail after its commit, when those points of ``role`` are armed."""
    from services.jobs.database import Database

    write = Database.write

    @contextmanager
    def wrapped(self: Database) -> Iterator[Any]:
        if take(folder, f"{role}: database full"):
            raise self._unavailable("database or disk is full")
        with write(self) as session:
            yield session
        if take(folder, f"{role}: answer of a commit lost"):
            raise self._unavailable("the connection was lost")

    Database.write = wrapped  # type: ignore[method-assign]


def step_clock(folder: Path, name: str) -> None:
    """Shift the wall clock of process ``name`` by the seconds in the file ``clock of NAME``."""
    from services.jobs import transitions

    file = folder / f"clock of {name}"

    def now() -> datetime:
        try:
            return datetime.now(UTC) + timedelta(seconds=float(file.read_text()))
        except (OSError, ValueError):
            return datetime.now(UTC)

    transitions.now = now

"""Named points at which a process of the arena dies, or is told that something failed.

The platform has no hooks for faults: the arena's own entry modules wrap its functions. A point is armed by a file of
its name in the arena's folder of faults; the process that removes the file takes the fault, so each happens once.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

VARIABLE = "CHAOS_FAULTS"

POINTS = (
    # A worker dies.
    "bell popped, not recorded",
    "claimed",
    "checkpoint uploaded, not committed",
    "before the terminal commit",
    "after the terminal commit",
    # A gateway, the reconciler, a job's process.
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

F = TypeVar("F", bound=Callable[..., Any])


def take(folder: Path, name: str) -> bool:
    """Whether the point is armed, and this caller the one that takes it."""
    try:
        (folder / name).unlink()
    except OSError:
        return False
    return True


def die() -> None:
    """As by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(folder: Path, name: str, function: F) -> F:
    """``function``, but that the process dies before it when the point is armed."""

    @wraps(function)
    def wrapped(*words: Any, **options: Any) -> Any:
        if take(folder, name):
            die()
        return function(*words, **options)

    return wrapped  # type: ignore[return-value]


def after(folder: Path, name: str, function: F) -> F:
    """``function``, but that the process dies after it when the point is armed."""

    @wraps(function)
    def wrapped(*words: Any, **options: Any) -> Any:
        answer = function(*words, **options)
        # An idle worker's claim that found nothing is none.
        if answer is not None and take(folder, name):
            die()
        return answer

    return wrapped  # type: ignore[return-value]


def full_store(folder: Path, name: str) -> None:
    """Writes to the artifact store find no space when the point is armed."""
    from services.artifacts.backends import LocalBackend

    add = LocalBackend.add

    def wrapped(self: Any, source: Path) -> Any:
        if take(folder, name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, source)

    LocalBackend.add = wrapped  # type: ignore[method-assign]


def failing_database(folder: Path, process: str) -> None:
    """Write transactions that fail, and such that are committed and then seem to have failed."""
    from services.jobs.database import Database

    write = Database.write

    @contextmanager
    def wrapped(self: Database) -> Iterator[Any]:
        if take(folder, f"{process}: database full"):
            raise self._unavailable("database or disk is full")
        with write(self) as session:
            yield session
        if take(folder, f"{process}: answer of a commit lost"):
            raise self._unavailable("the connection was lost")

    Database.write = wrapped  # type: ignore[method-assign]


def stepped_clock(folder: Path, process: str) -> None:
    """A wall clock that is wrong by as many seconds as the file ``clock of PROCESS`` says."""
    from services.jobs import transitions

    said = folder / f"clock of {process}"

    def now() -> datetime:
        try:
            return datetime.now(UTC) + timedelta(seconds=float(said.read_text()))
        except (OSError, ValueError):
            return datetime.now(UTC)

    transitions.now = now


def folder_of_faults() -> Path:
    """The arena's, as its processes are told."""
    return Path(os.environ[VARIABLE])

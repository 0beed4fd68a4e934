"""Named points at which a process of the arena dies, or one of its calls fails.

``python -m benchmarks._chaos.points NAME`` is a process of the platform with these points; NAME is its name in the
arena: ``gateway-0``, ``worker-1``, ``reconciler``. The platform has no hooks for faults, so its functions are wrapped.
A point is armed by a file of its name in the arena's folder of faults; the process that removes the file takes the
fault, so each happens once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from ethogram.specs.kinds import KINDS

VARIABLE = "CHAOS_FAULTS"
"""Environment variable with the folder of faults."""


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def find_no_space() -> None:
    """Fail as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hang() -> None:
    """Go silent for longer than any job may."""
    time.sleep(3600)


class Hook(NamedTuple):
    """Where a point is: at calls of ``method`` (``module:Class.name``) by processes of ``role``."""

    role: str
    method: str
    fault: Callable[[], None] = die
    after: bool = False
    """Whether the fault comes after the call, unless that returned None (a claim that found no job)."""


_REGISTRY, _STORE = "services.jobs.registry:JobRegistry", "services.artifacts.backends:LocalBackend"
HOOKS = {
    "bell popped, not recorded": Hook("worker", "kombu.transport.redis:QoS.append"),
    "claimed": Hook("worker", f"{_REGISTRY}.claim_next", after=True),
    "checkpoint uploaded, not committed": Hook("worker", f"{_REGISTRY}.commit_checkpoint"),
    "before the terminal commit": Hook("worker", f"{_REGISTRY}.succeed"),
    "after the terminal commit": Hook("worker", f"{_REGISTRY}.succeed", after=True),
    "submission committed, bell not rung": Hook("gateway", "gateway.services:Services.announce"),
    "loss recorded, not told": Hook("reconciler", f"{_REGISTRY}.release", after=True),
    # A job's process writes one small file, the manifest; the blobs are there by then.
    "in the middle of an upload": Hook("child", f"{_STORE}.write"),
    "gateway: store full": Hook("gateway", f"{_STORE}.add", find_no_space),
    "child: store full": Hook("child", f"{_STORE}.add", find_no_space),
    "child hangs": Hook("child", f"{_STORE}.write", hang),
}
DATABASE_ROLES = ("worker", "gateway", "reconciler")
DATABASE_FULL, ANSWER_LOST = "database full", "answer of a commit lost"
POINTS = (*HOOKS, *(f"{role}: {failure}" for role in DATABASE_ROLES for failure in (DATABASE_FULL, ANSWER_LOST)))


def take(folder: Path, name: str) -> bool:
    """Disarm the point; whether it was armed and this caller was the first to disarm it."""
    try:
        (folder / name).unlink()
    except OSError:
        return False
    return True


def install(folder: Path, role: str) -> None:
    """Wrap the functions at which this process, one of ``role``, has its points."""
    for name, hook in HOOKS.items():
        if hook.role == role:
            _wrap(folder, name, hook)
    if role in DATABASE_ROLES:
        _fail_database(folder, role)


def _wrap(folder: Path, name: str, hook: Hook) -> None:
    owner_name, _, method = hook.method.rpartition(".")
    owner = resolve_name(owner_name)
    function = getattr(owner, method)

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if not hook.after and take(folder, name):
            hook.fault()
        answer = function(*arguments, **options)
        if hook.after and answer is not None and take(folder, name):
            hook.fault()
        return answer

    setattr(owner, method, wrapped)


def _fail_database(folder: Path, role: str) -> None:
    """Make a write transaction fail, or seem to fail after its commit, when those points are armed."""
    from services.jobs.database import Database

    write = Database.write

    @contextmanager
    def wrapped(self: Database) -> Iterator[Any]:
        if take(folder, f"{role}: {DATABASE_FULL}"):
            raise self._unavailable("database or disk is full")
        with write(self) as session:
            yield session
        if take(folder, f"{role}: {ANSWER_LOST}"):
            raise self._unavailable("the connection was lost")

    Database.write = wrapped  # type: ignore[method-assign]


def _step_clock(folder: Path, name: str) -> None:
    """Shift the wall clock of process ``name`` by the seconds in the file ``clock of NAME``."""
    from services.jobs import transitions

    file = folder / f"clock of {name}"

    def now() -> datetime:
        try:
            return datetime.now(UTC) + timedelta(seconds=float(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return datetime.now(UTC)

    transitions.now = now


def main() -> None:
    """Run the process of the arena that the command line names."""
    folder, name = Path(os.environ[VARIABLE]), sys.argv.pop(1)
    role = name.partition("-")[0]
    # The arena finds this process, and all that it starts, by their working folder.
    os.chdir(folder.parent)
    _step_clock(folder, name)
    install(folder, role)
    if role == "gateway":
        from gateway.__main__ import main as serve

        serve()
    elif role == "worker":
        from workers.app import main as work

        work({kind: replace(KINDS[kind], job=f"benchmarks._chaos.jobs:{kind}") for kind in KINDS})
    else:
        from workers.reconciler import main as reconcile

        reconcile()


if __name__ == "__main__":
    main()

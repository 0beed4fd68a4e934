"""Scratch folders of jobs: one folder per worker process, and what dead workers left is removed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"


@contextmanager
def folder(base: Path) -> Iterator[Path]:
    """A folder of this process below ``base``, removed at the end.

    Its owner holds a lock on it for as long as it lives, so that the next worker can tell an orphan.
    """
    base.mkdir(parents=True, exist_ok=True)
    for sibling in base.iterdir():
        _remove_orphan(sibling)
    own = Path(tempfile.mkdtemp(prefix="worker-", dir=base))
    with (own / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _remove_orphan(sibling: Path) -> None:
    # One without a lock was made this very moment.
    with suppress(OSError), (sibling / LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(sibling, ignore_errors=True)

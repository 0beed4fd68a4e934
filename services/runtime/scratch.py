"""Scratch folders: one per process; those of dead processes are removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ethogram.errors import Unavailable

LOCK = "ethogram.lock"
"""File of a scratch folder; a folder without one is not."""


@contextmanager
def folder(base: Path, process: str) -> Iterator[Path]:
    """A folder of this process below ``base``, removed at the end; its name begins with ``process``.

    Its owner holds a lock on it while it lives, so that another process can recognise an orphan. Raises
    :class:`Unavailable` when it cannot be created.
    """
    try:
        scratch, lock = _make(base, process)
    except OSError as error:
        raise Unavailable(
            f"{base} cannot be written ({error.strerror}): free some space, or name another folder in ETHOGRAM_STATE"
        ) from None
    with lock:
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _make(base: Path, process: str) -> tuple[Path, IO[str]]:
    base.mkdir(parents=True, exist_ok=True)
    turn = os.open(base, os.O_RDONLY)
    try:
        # One at a time: nobody takes a folder for an orphan before its owner has locked it.
        fcntl.flock(turn, fcntl.LOCK_EX)
        for sibling in base.iterdir():
            with suppress(OSError), (sibling / LOCK).open("r+", encoding="utf-8") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(sibling, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{process}-", dir=base))
        lock = (scratch / LOCK).open("w", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return scratch, lock
    finally:
        os.close(turn)

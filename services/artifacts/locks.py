"""The lock of a store in a folder: writers share it, and the collector has it alone for moments.

It is the kernel's (``flock``): it ends with its holder, however that ends, and no clock plays a part. A collector that
waits holds nobody up; it gives up where writers leave it no gap. On a file system without locks nobody holds any, and
nothing is ever collected there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ethogram.errors import Unavailable

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_LOOK_SECONDS = 0.005


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold the lock together with other writers; waits while a collector has it."""
    with _opened(path) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


@contextmanager
def alone(path: Path, seconds: float) -> Iterator[bool]:
    """Hold the lock with nobody else; False when others held it all the ``seconds``.

    Raises :class:`Unavailable` on a file system that has no locks.
    """
    deadline = time.monotonic() + seconds
    with _opened(path) as descriptor:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(_LOOK_SECONDS)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise Unavailable(
                    f"the file system of {path.parent} has no locks, so nothing is collected there; keep the store on "
                    "another one, or set ETHOGRAM_GC_PERIOD_SECONDS=0"
                ) from None
            else:
                yield True
                return


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

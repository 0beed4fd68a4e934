"""The folder of results that are slow to compute and never change. It only saves time: where it cannot be used, a job
computes them again."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """The folder ``name`` of the cache: in ``ETHOGRAM_CACHE``, or ``ethogram`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    Raises :class:`OSError` for a user without a home."""
    given = os.environ.get("ETHOGRAM_CACHE")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ethogram")
    try:
        return root.expanduser().absolute() / name
    except RuntimeError as error:
        raise OSError(0, str(error), str(root)) from None


@contextmanager
def best_effort(warn: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Do without the cache where it cannot be written, and say so."""
    try:
        yield
    except OSError as error:
        where = error.filename or os.environ.get("ETHOGRAM_CACHE") or "the cache"
        warn(f"{where} cannot be used ({error.strerror or error}); nothing is cached. Name a folder in ETHOGRAM_CACHE")


def writable_folder(name: str) -> Path:
    """The folder ``name`` of the cache, or, where it cannot be written, one that lives as long as this process."""
    with best_effort():
        folder = cache_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    folder = Path(tempfile.mkdtemp(prefix="ethogram-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

"""Models that are trained once and kept in the cache."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from services.runtime.cache import cache_folder, writable_folder
from services.runtime.console import ConsoleRun
from services.runtime.run import Run

_CHECKPOINT_SECONDS = 30.0


def trained_once(name: str, model: str, train: Callable[[Run, Path], None], device: str = "cpu") -> Path:
    """The folder ``model`` in the folder ``name`` of the cache. Where there is none, ``train`` fills it, resuming from
    the checkpoint of an interrupted call; ``name`` must stand for all that it depends on."""
    with suppress(OSError):
        if (kept := cache_folder(name) / model).exists():
            return kept
    folder = writable_folder(name)
    if not (folder / model).exists():
        with (folder / "lock").open("w", encoding="utf-8") as lock:
            # One process trains, others wait for its model.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / model).exists():
                fresh = folder / f"{model}.new"
                with ConsoleRun(folder, device, checkpoint_seconds=_CHECKPOINT_SECONDS) as run:
                    shutil.rmtree(fresh, ignore_errors=True)
                    train(run, fresh)
                    fresh.rename(folder / model)
    return folder / model

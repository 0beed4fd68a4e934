"""Models that are trained once and kept in the cache."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from services.runtime.cache import cache_folder, writable_folder
from services.runtime.console import CHECKPOINT, ConsoleRun
from services.runtime.run import Run

_CHECKPOINT_SECONDS = 30.0


class _Within(ConsoleRun):
    """Keeps checkpoints in a folder, and reports to the run of which this training is a part."""

    def __init__(self, run: Run, folder: Path, name: str) -> None:
        super().__init__(folder, run.device, console=Console(quiet=True), checkpoint_seconds=_CHECKPOINT_SECONDS)
        self._run, self._name = run, name

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        super().stage(name, total, unit)
        self._run.stage(f"{self._name}/{name}", total, unit)

    def advance(self, done: int) -> None:
        self._run.advance(done)

    def log(self, message: str, level: str = "info") -> None:
        self._run.log(f"{self._name}: {message}", level)


def trained_once(
    name: str, model: str, train: Callable[[Run, Path], None], device: str = "cpu", run: Run | None = None
) -> Path:
    """The folder ``model`` in the folder ``name`` of the cache. Where there is none, ``train`` fills it, resuming from
    the checkpoint of an interrupted call; ``name`` must stand for all that it depends on. ``run``: what the training
    reports to, and whose device it takes; by default the terminal. Whoever interrupts it is told what is kept."""
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
                with (
                    ConsoleRun(folder, device, checkpoint_seconds=_CHECKPOINT_SECONDS)
                    if run is None
                    else _Within(run, folder, Path(name).parent.name)
                ) as training:
                    shutil.rmtree(fresh, ignore_errors=True)
                    try:
                        train(training, fresh)
                    except BaseException:
                        if (folder / CHECKPOINT).exists() and _is_in_cache(folder, name):
                            note = f"Run the same command again to resume from the last checkpoint, in {folder}."
                            if run is None:
                                training.log(note)
                            else:
                                run.resume_note = note
                        raise
                    fresh.rename(folder / model)
    return folder / model


def _is_in_cache(folder: Path, name: str) -> bool:
    """Whether ``folder`` is the one of ``name`` in the cache, not one that this process removes."""
    with suppress(OSError):
        return folder == cache_folder(name)
    return False

"""Slots of a worker: each owns a GPU or a number of CPU threads and runs one job at a time."""

from __future__ import annotations

import os
from dataclasses import dataclass

from workers.settings import WorkerSettings


@dataclass(frozen=True)
class Slot:
    """One job's share of the machine."""

    index: int
    device: str
    """Torch device as the job sees it."""
    threads: int
    """CPU threads."""
    gpus: str
    """Value of ``CUDA_VISIBLE_DEVICES`` for the job."""


def slots_of(settings: WorkerSettings) -> list[Slot]:
    """The slots of this worker. A job in a GPU slot sees that GPU alone, as ``cuda:0``."""
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return [
        Slot(index, "cuda:0", settings.threads_per_slot, visible[index] if index < len(visible) else str(index))
        if settings.device == "cuda"
        else Slot(index, "cpu", settings.threads_per_slot, "")
        for index in range(settings.slots)
    ]

"""The settings of the worker and the reconciler, and the slots of a worker."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from services.runtime.settings import ExporterSettings, Names


class WorkerSettings(ExporterSettings):
    """Queues, slots, devices and timeouts."""

    queues: Annotated[Names, Field(min_length=1)] = ["cpu"]
    """Queues (machine classes) that this worker serves, separated by commas."""
    slots: int = Field(1, ge=1, le=256)
    """Jobs that run at the same time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """``cuda``: slot i owns the i-th visible GPU."""
    threads: int = Field(0, ge=0, le=4096)
    """CPU threads of each job; 0: the machine's, divided by the slots."""
    lease_seconds: float = Field(10.0, gt=0)
    """An attempt without a heartbeat for this long is lost. A worker sends three in this time."""
    checkpoint_seconds: float = Field(30.0, ge=0)
    """Time between the checkpoints of a job."""
    grace_seconds: float = Field(20.0, ge=0)
    """Time for a job to checkpoint or clean up before its process is killed."""
    gc_grace_seconds: float = Field(3600.0, ge=0)
    """An artifact is deleted once nothing has needed it for this long."""
    gc_period_seconds: float = Field(600.0, ge=0)
    """Time between collections; 0: nothing is ever deleted."""
    retention_days: float = Field(0.0, ge=0, le=100_000)
    """Jobs that ended longer ago are deleted with the artifacts that only they need; 0: never."""


@dataclass(frozen=True)
class Slot:
    """One job's share of the machine: a GPU or a number of CPU threads."""

    index: int
    device: str
    """Torch device as the job sees it."""
    threads: int
    """CPU threads."""
    gpus: str
    """Value of ``CUDA_VISIBLE_DEVICES`` for the job."""


def slots_of(settings: WorkerSettings) -> list[Slot]:
    """The slots of a worker. A job in a GPU slot sees that GPU alone, as ``cuda:0``."""
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.slots)
    if settings.device == "cpu":
        return [Slot(index, "cpu", threads, "") for index in range(settings.slots)]
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = [*visible, *map(str, range(len(visible), settings.slots))]
    return [Slot(index, "cuda:0", threads, gpus[index]) for index in range(settings.slots)]

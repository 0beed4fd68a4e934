"""What the worker and the reconciler read from their environment, once, at start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ethogram.errors import InvalidInput


class WorkerSettings(BaseSettings):
    """Prefix ``ETHOGRAM_``, but for ``REDIS_URL``."""

    model_config = SettingsConfigDict(env_prefix="ETHOGRAM_", extra="ignore", use_attribute_docstrings=True)

    state: Path = Path("runs/state")
    """Folder of the platform's state; jobs' scratch folders are below it."""
    database_url: str = ""
    """The registry; empty: SQLite in the state folder."""
    redis_url: str = Field("redis://127.0.0.1:6379/0", validation_alias="REDIS_URL")
    """The doorbell."""
    store: str = ""
    """The artifact store, a folder or an fsspec URL; empty: in the state folder."""
    queues: Annotated[list[str], NoDecode, Field(min_length=1)] = ["cpu"]
    """Machine classes that this worker serves, separated by commas."""
    slots: int = Field(1, ge=1, le=256)
    """Jobs at the same time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """``cuda``: slot i owns the i-th visible GPU."""
    threads: int = Field(0, ge=0)
    """CPU threads of each job; 0: the machine's, divided by the slots."""
    lease_seconds: float = Field(10.0, gt=0)
    """A worker that says nothing for this long is taken for dead. It says something three times as often."""
    checkpoint_seconds: float = Field(30.0, ge=0)
    """Time between the checkpoints of a job."""
    grace_seconds: float = Field(20.0, ge=0)
    """Time that a job has to checkpoint or clean up before its process is killed."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""

    @field_validator("queues", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @property
    def database(self) -> str:
        """URL of the registry."""
        return self.database_url or f"sqlite:///{self.state.resolve() / 'registry.db'}"

    @property
    def store_url(self) -> str:
        """The store, absolute: a job's process has another current folder."""
        store = self.store or str(self.state / "store")
        return store if "://" in store else str(Path(store).resolve())

    @property
    def work(self) -> Path:
        """Where jobs' scratch folders are."""
        return self.state.resolve() / "work"

    @property
    def threads_per_slot(self) -> int:
        """CPU threads of one job."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // self.slots)


def load() -> WorkerSettings:
    """The settings of this process. Raises :class:`InvalidInput` that names the variable."""
    try:
        return WorkerSettings()
    except ValidationError as error:
        details = [
            {
                **detail,
                "loc": tuple(part if part == "REDIS_URL" else f"ETHOGRAM_{part}".upper() for part in detail["loc"]),
            }
            for detail in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise InvalidInput.from_details(details) from None

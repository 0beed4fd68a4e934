"""Settings of every process of the platform, read from its environment once, at start."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ethogram.errors import InvalidInput
from ethogram.paths import user_path
from ethogram.platform.state import STATE, StateDir

logger = logging.getLogger(__name__)

_LONGEST, _LARGEST = 1e9, 2**53


def _split(value: object) -> object:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], NoDecode, BeforeValidator(_split)]
"""Names, separated by commas."""


class ProcessSettings(BaseSettings):
    """The variable of each is ``ETHOGRAM_`` and its name in capitals, except ``REDIS_URL``."""

    model_config = SettingsConfigDict(
        env_prefix="ETHOGRAM_", extra="ignore", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    state: Path = Path(STATE)
    """Folder of the platform's state; scratch folders are in its subfolder ``work``."""
    database_url: str = ""
    """URL of the registry; empty: SQLite in the state folder."""
    store: str = ""
    """The artifact store, a folder or an fsspec URL; empty: in the state folder."""
    redis_url: Annotated[str, Field(validation_alias="REDIS_URL")] = "redis://127.0.0.1:6379/0"
    """Redis, which carries hints of new jobs and events."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Minimum level that is logged."""

    @model_validator(mode="before")
    @classmethod
    def _without_service_links(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Kubernetes sets ``ETHOGRAM_PORT=tcp://10.0.0.1:80`` in every pod beside a Service named ``ethogram``, and
        ``ETHOGRAM_METRICS_PORT`` beside one named ``ethogram-metrics``."""
        links = {
            name
            for name, value in values.items()
            if name.endswith("port") and re.match("(tcp|udp|sctp)://", str(value))
        }
        for name in sorted(links):
            logger.warning(
                "ETHOGRAM_%s is ignored: %s is the address of a Kubernetes Service, not a port. Give the container a "
                "value of its own, or set enableServiceLinks: false in the pod",
                name.upper(),
                values[name],
            )
        return {name: value for name, value in values.items() if name not in links}

    @field_validator("*")
    @classmethod
    def _within_bounds(cls, value: object) -> object:
        # Sums and differences of times must stay dates.
        if isinstance(value, float) and not value <= _LONGEST:
            raise ValueError(f"must be at most {_LONGEST:g}")
        if isinstance(value, int) and value > _LARGEST:
            raise ValueError(f"must be at most {_LARGEST}")
        return value

    @classmethod
    def read(cls) -> Self:
        """Read the environment. Raises :class:`InvalidInput`, which names the variable."""
        try:
            settings = cls()
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
            for detail in details:
                parts = (part if part == "REDIS_URL" else f"ETHOGRAM_{part}".upper() for part in detail["loc"])
                detail["loc"] = tuple(parts)
            raise InvalidInput.from_details(details) from None
        # Wrong paths are found now, not by the first job.
        _ = settings.work, settings.store_url
        return settings

    @property
    def database(self) -> str:
        """URL of the registry."""
        return self.database_url or self.folder.database_url

    @property
    def store_url(self) -> str:
        """URL or absolute path of the store: a job's process has another current folder."""
        store = self.store or str(self.folder.store)
        return store if "://" in store else str(user_path(store, "ETHOGRAM_STORE").resolve())

    @property
    def work(self) -> Path:
        """Folder of the scratch folders."""
        return self.folder.work

    @property
    def folder(self) -> StateDir:
        """The state folder."""
        return StateDir(user_path(self.state, "ETHOGRAM_STATE").resolve())


class ExporterSettings(ProcessSettings):
    """Those of a process that has no HTTP server but for its metrics."""

    metrics_port: int = Field(0, ge=0, le=65_535)
    """TCP port of this process's Prometheus metrics; 0: none."""
    metrics_host: str = "127.0.0.1"
    """Address of that port; ``0.0.0.0`` for all."""

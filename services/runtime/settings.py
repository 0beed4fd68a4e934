"""Settings of every process of the platform, read from its environment once, at start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ethogram.errors import InvalidInput


class ProcessSettings(BaseSettings):
    """The variable of each is ``ETHOGRAM_`` and its name in capitals, except ``REDIS_URL``."""

    model_config = SettingsConfigDict(
        env_prefix="ETHOGRAM_", extra="ignore", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    state: Path = Path("runs/state")
    """Folder of the platform's state; scratch folders are in its subfolder ``work``."""
    database_url: str = ""
    """URL of the registry; empty: SQLite in the state folder."""
    store: str = ""
    """The artifact store, a folder or an fsspec URL; empty: in the state folder."""
    redis_url: Annotated[str, Field(validation_alias="REDIS_URL")] = "redis://127.0.0.1:6379/0"
    """Redis, which carries hints of new jobs and events."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Minimum level that is logged."""

    @classmethod
    def read(cls) -> Self:
        """Read the environment. Raises :class:`InvalidInput`, which names the variable."""
        try:
            return cls()
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False, include_input=False)
            for detail in details:
                parts = (part if part == "REDIS_URL" else f"ETHOGRAM_{part}".upper() for part in detail["loc"])
                detail["loc"] = tuple(parts)
            raise InvalidInput.from_details(details) from None

    @property
    def database(self) -> str:
        """URL of the registry."""
        return self.database_url or f"sqlite:///{self._root / 'registry.db'}"

    @property
    def store_url(self) -> str:
        """URL or absolute path of the store: a job's process has another current folder."""
        store = self.store or str(self._root / "store")
        return store if "://" in store else str(Path(store).expanduser().resolve())

    @property
    def work(self) -> Path:
        """Folder of the scratch folders."""
        return self._root / "work"

    @property
    def _root(self) -> Path:
        return self.state.expanduser().resolve()

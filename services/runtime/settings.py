"""What every process of the platform reads from its environment, once, at start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ethogram.errors import InvalidInput


class ProcessSettings(BaseSettings):
    """Each is ``ETHOGRAM_`` and its name in capitals, but ``REDIS_URL``, which has no prefix."""

    model_config = SettingsConfigDict(
        env_prefix="ETHOGRAM_", extra="ignore", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    state: Path = Path("runs/state")
    """Folder of the platform's state; scratch folders are in its ``work``."""
    database_url: str = ""
    """The registry; empty: SQLite in the state folder."""
    store: str = ""
    """The artifact store, a folder or an fsspec URL; empty: in the state folder."""
    redis_url: Annotated[str, Field(validation_alias="REDIS_URL")] = "redis://127.0.0.1:6379/0"
    """Redis, for the doorbell and for hints of new events."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""

    @classmethod
    def read(cls) -> Self:
        """The settings in the environment. Raises :class:`InvalidInput` that names the variable."""
        try:
            return cls()
        except ValidationError as error:
            details = [
                {
                    **detail,
                    "loc": tuple(part if part == "REDIS_URL" else f"ETHOGRAM_{part}".upper() for part in detail["loc"]),
                }
                for detail in error.errors(include_url=False, include_context=False, include_input=False)
            ]
            raise InvalidInput.from_details(details) from None

    @property
    def database(self) -> str:
        """URL of the registry."""
        return self.database_url or f"sqlite:///{self._root / 'registry.db'}"

    @property
    def store_url(self) -> str:
        """The store, absolute: a job's process has another current folder."""
        store = self.store or str(self._root / "store")
        return store if "://" in store else str(Path(store).expanduser().resolve())

    @property
    def work(self) -> Path:
        """Where scratch folders are."""
        return self._root / "work"

    @property
    def _root(self) -> Path:
        return self.state.expanduser().resolve()

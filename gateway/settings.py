"""The gateway's settings, read from the environment once, in its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ethogram.errors import InvalidInput


class GatewaySettings(BaseSettings):
    """Each is ``ETHOGRAM_`` and its name in capitals, but ``REDIS_URL``, which has no prefix."""

    model_config = SettingsConfigDict(
        env_prefix="ETHOGRAM_", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    state: Path = Path("runs/state")
    """State directory; scratch space of uploads lies in its ``work``."""
    database_url: str = ""
    """The registry's database; empty: ``registry.db`` in the state directory."""
    store: str = ""
    """Folder or URL of the artifact store; empty: ``store`` in the state directory."""
    redis_url: Annotated[str, Field(validation_alias="REDIS_URL")] = "redis://127.0.0.1:6379/0"
    """Redis, for the doorbell and for hints of new events."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8321, ge=0, le=65_535)
    """TCP port to listen on; 0: any free one."""
    inference: str = "127.0.0.1:8322"
    """``host:port`` of the inference service, as clients reach it."""
    body_limit: int = Field(8 * 2**20, ge=1024)
    """Most bytes of a JSON body."""
    upload_limit: int = Field(32 * 2**30, ge=1024)
    """Most bytes of an uploaded artifact."""
    stream_limit: int = Field(8192, ge=1)
    """Most event streams open at once."""
    log_level: str = "INFO"
    """Least level of the log."""

    @classmethod
    def read(cls) -> GatewaySettings:
        """The settings in the environment, with absolute paths. Raises :class:`InvalidInput` naming the variable."""
        try:
            given = cls()
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, "settings") from None
        state = given.state.expanduser().absolute()
        return given.model_copy(
            update={
                "state": state,
                "database_url": given.database_url or f"sqlite:///{state / 'registry.db'}",
                "store": given.store or str(state / "store"),
            }
        )

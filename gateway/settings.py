"""The gateway's settings."""

from __future__ import annotations

from pydantic import Field

from services.runtime.settings import ProcessSettings


class GatewaySettings(ProcessSettings):
    """Address and limits."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8321, ge=0, le=65_535)
    """TCP port to listen on; 0: any free one."""
    inference: str = "127.0.0.1:8322"
    """``host:port`` of the inference service, as clients reach it."""
    body_limit: int = Field(2 * 2**20, ge=1024)
    """Most bytes of a JSON body."""
    upload_limit: int = Field(32 * 2**30, ge=1024)
    """Most bytes of an uploaded artifact."""
    stream_limit: int = Field(8192, ge=1)
    """Most event streams open at once."""

"""The gateway's settings."""

from __future__ import annotations

from ipaddress import ip_address

from pydantic import Field, field_validator

from services.runtime.settings import Names, ProcessSettings


def is_address(host: str) -> bool:
    """Whether ``host`` is an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine, under any name or address of loopback."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return is_address(host) and ip_address(host).is_loopback


class GatewaySettings(ProcessSettings):
    """Address and limits."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8321, ge=0, le=65_535)
    """TCP port to listen on; 0: any free one."""
    hosts: Names = []
    """Names by which clients reach the gateway, separated by commas, beside those of loopback. On another address than
    loopback, it answers to any IP address too, and to any name if there are none here."""
    inference: str = "127.0.0.1:8322"
    """``host:port`` of the inference service, as clients reach it."""
    body_limit: int = Field(2 * 2**20, ge=1024)
    """Most bytes of a JSON body."""
    upload_limit: int = Field(32 * 2**30, ge=1024)
    """Most bytes of an uploaded artifact."""
    stream_limit: int = Field(8192, ge=1)
    """Most event streams open at once."""

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: list[str]) -> list[str]:
        # A name with the root's dot is the same, and Host headers are compared without it.
        hosts = [host.removesuffix(".").lower() for host in hosts]
        for host in hosts:
            if not host or not host.isascii() or any(letter in host for letter in "/:*@ "):
                raise ValueError(f"{host!r} is not a name such as zoos.example.org; leave out scheme and port")
        return hosts

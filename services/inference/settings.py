"""Settings of the inference server: ``ETHOGRAM_*`` in the environment, read once in the entry point."""

from __future__ import annotations

from pydantic import Field

from ethogram.rpc import MAX_MESSAGE_BYTES
from services.runtime.settings import ExporterSettings


class InferenceSettings(ExporterSettings):
    """Settings of the inference server. Time in seconds, memory in bytes.

    ``inference.json`` in the state folder says where the server listens while it does.
    """

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` for all."""
    port: int = Field(0, ge=0, le=65_535)
    """Port; 0: any free one."""
    device: str = "auto"
    """Torch device of this process: ``cpu``, ``cuda:0``, ...; ``auto``: the first GPU, if there is one."""
    threads: int = Field(1, ge=1, le=4096)
    """CPU threads of torch. With a small model threads wait for each other longer than they work."""
    max_batch: int = Field(256, ge=1)
    """Most networks or configurations that are computed at a time."""
    max_wait_seconds: float = Field(0.002, ge=0, le=1)
    """How long a request waits for others to share a batch with."""
    max_pending: int = Field(16_384, ge=1)
    """Most networks or configurations that wait or are computed; more are refused with RESOURCE_EXHAUSTED."""
    max_models: int = Field(8, ge=1)
    """Most models in memory; the least recently used leaves first."""
    max_model_bytes: int = Field(8 * 2**30, ge=1)
    """Most memory of all models together, without the language models that describe configurations."""
    max_message_bytes: int = Field(MAX_MESSAGE_BYTES, ge=1024)
    """Largest message in either direction."""
    refresh_seconds: float = Field(2.0, gt=0)
    """How often newly published and retired versions are looked up."""
    grace_seconds: float = Field(10.0, ge=0)
    """How long running requests may take to finish when the server is asked to stop."""

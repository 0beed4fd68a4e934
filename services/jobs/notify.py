"""Tells gateways that a job has something new; what it is they read from the registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.jobs.background import Outbox
from services.jobs.bell import checked_redis_url, redis_client

if TYPE_CHECKING:
    import redis

CHANNEL = "ethogram:events"
"""Redis channel; each message is ``{"job": id, "seq": newest event}``."""


class Notifier:
    """Publishes to :data:`CHANNEL`, best effort, from a thread of its own."""

    def __init__(self, redis_url: str) -> None:
        self._url = checked_redis_url(redis_url)
        self._redis: redis.Redis | None = None
        self._outbox: Outbox[int] = Outbox("notifications", self._deliver)

    def notify(self, job: str, seq: int) -> None:
        """Something about ``job`` changed; its newest event is ``seq``. Never blocks and never fails."""
        self._outbox.put(job, seq)

    def flush(self, timeout: float = 2.0) -> bool:
        """Wait until all was published, or tried; False if that took longer than ``timeout`` seconds."""
        return self._outbox.flush(timeout)

    def close(self, timeout: float = 2.0) -> None:
        """Publish what is left, then end."""
        self._outbox.close(timeout)

    def _deliver(self, job: str, seq: int) -> None:
        if self._redis is None:
            self._redis = redis_client(self._url)
        self._redis.publish(CHANNEL, json.dumps({"job": job, "seq": seq}))

"""Notifications to gateways that a job has something new, which they then read from the registry."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.jobs.bell import checked_redis_url, redis_client
from services.jobs.outbox import Outbox

if TYPE_CHECKING:
    import redis

CHANNEL = "ethogram:events"
"""Redis channel; each message is ``{"job": id, "seq": newest event}``."""


class Notifier(Outbox[int]):
    """Publishes to :data:`CHANNEL`, best effort."""

    def __init__(self, redis_url: str) -> None:
        self._url = checked_redis_url(redis_url)
        self._redis: redis.Redis | None = None
        super().__init__("notifications")

    def notify(self, job: str, seq: int) -> None:
        """Say that ``job`` changed; its newest event is ``seq``. Never blocks and never fails."""
        self.put(job, seq)

    def _deliver(self, key: str, value: int) -> None:
        if self._redis is None:
            self._redis = redis_client(self._url)
        self._redis.publish(CHANNEL, json.dumps({"job": key, "seq": value}))

"""The doorbell: tells idle workers that a queue has work. It carries no job: a worker claims the next one from the
registry. A lost or doubled bell does no harm, and the reconciler rings again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from ethogram.errors import InvalidInput
from services.jobs.outbox import Outbox

if TYPE_CHECKING:
    import redis

RING = "ethogram.ring"
"""Name of the one Celery task; its argument is the queue."""


def celery_queue(queue: str) -> str:
    """Celery's queue (a list in Redis) for a machine class."""
    return f"ethogram.{queue}"


def checked_redis_url(url: str) -> str:
    """``url`` if Celery can use it. Raises :class:`InvalidInput` otherwise."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InvalidInput.field("REDIS_URL", str(error)) from None
    if "cluster" in parts.scheme or "," in parts.netloc or ";" in url:
        raise InvalidInput.field(
            "REDIS_URL",
            "Redis Cluster cannot carry Celery's queues; give the URL of one Redis server (redis://host:6379/0)",
        )
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or not _has_port(parts):
        raise InvalidInput.field("REDIS_URL", "must look like redis://host:6379/0, or rediss:// for TLS")
    return url


def _has_port(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


def without_password(url: str) -> str:
    """``url`` without user and password, to show."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def redis_client(url: str) -> redis.Redis:
    """A client with short timeouts."""
    import redis

    return redis.Redis.from_url(checked_redis_url(url), socket_timeout=5, socket_connect_timeout=2)


def celery_app(redis_url: str) -> Any:
    """A Celery application with the settings that senders and workers share."""
    from celery import Celery

    app = Celery("ethogram", broker=checked_redis_url(redis_url), set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_publish_retry=False,
        broker_connection_timeout=2,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": 10,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 25,
            # Tasks are acknowledged when they are taken, so this is never reached.
            "visibility_timeout": 3600,
        },
    )
    return app


class Bell(Outbox[None]):
    """Rings queues."""

    def __init__(self, redis_url: str) -> None:
        self._url = checked_redis_url(redis_url)
        self._app: Any = None
        self._redis: redis.Redis | None = None
        super().__init__("bell")

    def ring(self, queue: str) -> None:
        """Tell the workers of ``queue`` that it has work. Never blocks and never fails."""
        self.put(queue, None)

    def _deliver(self, key: str, value: None) -> None:
        # Importing Celery takes 0.3 s, so it happens in this thread.
        if self._app is None:
            self._app, self._redis = celery_app(self._url), redis_client(self._url)
        assert self._redis is not None
        # Nobody has heard a bell that still waits: whoever takes it finds this work too, and rings on.
        if self._redis.llen(celery_queue(key)) == 0:
            self._app.send_task(RING, args=[key], queue=celery_queue(key))

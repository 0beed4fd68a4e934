"""Signals through Redis: a bell that tells idle workers that a queue has work, and notifications to gateways that a job
has something new. Each is only a hint to read the registry, so one that is lost or doubled does no harm."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from ethogram.errors import EthogramError, InvalidInput, Unavailable

if TYPE_CHECKING:
    import redis

logger = logging.getLogger(__name__)

RING = "ethogram.ring"
"""Name of the one Celery task; its argument is the queue."""
_BROKER_OPTIONS = (
    *("socket_timeout", "socket_connect_timeout", "socket_keepalive", "health_check_interval", "retry_on_timeout"),
    *("client_name", "max_connections"),
)
"""Options of a Redis URL that Celery's transport has too."""
CHANNEL = "ethogram:events"
"""Redis channel; each message is ``{"job": id, "seq": newest event}``."""


def celery_queue(queue: str) -> str:
    """Celery's queue (a list in Redis) for a machine class."""
    return f"ethogram.{queue}"


def checked_redis_url(url: str) -> str:
    """``url`` if Celery and Redis' client can use it. Raises :class:`InvalidInput` otherwise."""
    import redis

    try:
        parts = urlsplit(url)
        cluster = "cluster" in parts.scheme or "," in parts.netloc or ";" in url
        valid = cluster or (parts.scheme in ("redis", "rediss") and parts.hostname and parts.port != 0)
    except ValueError:
        cluster = valid = False
    if cluster:
        raise InvalidInput.field(
            "REDIS_URL",
            "Redis Cluster cannot carry Celery's queues; give the URL of one Redis server (redis://host:6379/0)",
        )
    if not valid:
        raise InvalidInput.field("REDIS_URL", "must look like redis://host:6379/0, or rediss:// for TLS")
    try:
        redis.ConnectionPool.from_url(url).make_connection()
    except (TypeError, ValueError, redis.RedisError) as error:
        raise InvalidInput.field("REDIS_URL", f"has an option that is wrong or unknown: {error}") from None
    return url


def without_password(url: str) -> str:
    """``url`` without user, password and options, to show."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def redis_client(url: str) -> redis.Redis:
    """A client with short timeouts."""
    import redis

    return redis.Redis.from_url(checked_redis_url(url), socket_timeout=5, socket_connect_timeout=2)


def check_redis(url: str) -> None:
    """Raise :class:`Unavailable` when Redis does not answer."""
    import redis

    try:
        with redis.Redis.from_url(
            checked_redis_url(url), socket_connect_timeout=1, socket_timeout=1, retry=None
        ) as client:
            client.ping()
    except (redis.RedisError, OSError) as error:
        advice = "start it, or correct REDIS_URL"
        if url.startswith("rediss:") and re.search("certificate verify failed|No such file", str(error)):
            advice = (
                "trust its certificate with ?ssl_ca_certs=FILE at the end of REDIS_URL, or do without verification "
                "with ?ssl_cert_reqs=none"
            )
        raise Unavailable(f"Redis at {without_password(url)} does not answer ({error}): {advice}") from None


def celery_app(redis_url: str) -> Any:
    """A Celery application with the settings that senders and workers share."""
    from celery import Celery
    from redis.connection import parse_url

    # Celery reads the options of a URL in its own way: it refuses some, and takes TLS without options for TLS
    # without verification.
    parts = urlsplit(checked_redis_url(redis_url))
    options: dict[str, Any] = parse_url(redis_url)  # type: ignore[no-untyped-call]
    name, password = (quote(options.get(part, ""), safe="") for part in ("username", "password"))
    place = parts.netloc.rpartition("@")[2]
    app = Celery(
        "ethogram",
        broker=f"{parts.scheme}://{name}:{password}@{place}/{options.get('db', 0)}",
        set_as_current=False,
    )
    tls = {"ssl_cert_reqs": "required"} | {name: value for name, value in options.items() if name.startswith("ssl_")}
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_publish_retry=False,
        broker_connection_timeout=2,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_use_ssl=tls if parts.scheme == "rediss" else None,
        broker_transport_options={
            "socket_timeout": 10,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 25,
            # Tasks are acknowledged when they are taken, so this is never reached.
            "visibility_timeout": 3600,
            **{name: options[name] for name in _BROKER_OPTIONS if name in options},
        },
    )
    return app


class Outbox:
    """Delivers ``(key, number)`` pairs to Redis in a thread of its own; of a key's numbers only the newest.

    What cannot be delivered is dropped, with one warning per outage.
    """

    name: str

    def __init__(self, redis_url: str) -> None:
        self._url = checked_redis_url(redis_url)
        self._waiting: dict[str, int] = {}
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    def put(self, key: str, number: int) -> None:
        """Deliver soon. Never blocks and never fails."""
        with self._changed:
            self._waiting[key] = number
            self._changed.notify_all()

    def flush(self, timeout: float = 2.0) -> bool:
        """Wait until everything was delivered, or tried; False if that took longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout)

    def close(self, timeout: float = 2.0) -> None:
        """Flush, then end the thread."""
        self.flush(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _deliver(self, client: redis.Redis, key: str, number: int) -> None:
        """Send one message; called in the thread, and may raise."""
        raise NotImplementedError

    def _work(self) -> None:
        client: redis.Redis | None = None
        broken = False
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                waiting, self._waiting, self._busy = self._waiting, {}, True
            try:
                client = client or redis_client(self._url)
                for key, number in waiting.items():
                    self._deliver(client, key, number)
                if broken:
                    logger.info("Redis answers again", extra={"outbox": self.name})
                broken = False
            except Exception as error:
                if not broken:
                    logger.warning(
                        "Redis does not answer, so the %s cannot be sent. Nothing is lost: jobs start and show later. "
                        "Start Redis again, or set REDIS_URL",
                        self.name,
                        extra={"error": str(error)[:300]},
                    )
                broken = True
                time.sleep(0.2)


class Bell(Outbox):
    """Rings queues. A bell carries no job: a worker claims the next one from the registry, and the reconciler rings
    again."""

    name = "bell"
    _app: Any = None

    def ring(self, queue: str) -> None:
        """Tell the workers of ``queue`` that it has work. Never blocks and never fails."""
        self.put(queue, 0)

    def _deliver(self, client: redis.Redis, key: str, number: int) -> None:
        # Importing Celery takes 0.3 s, so it happens in this thread.
        self._app = self._app or celery_app(self._url)
        # Nobody has heard a bell that still waits: whoever takes it finds this work too, and rings on.
        if client.llen(celery_queue(key)) == 0:
            self._app.send_task(RING, args=[key], queue=celery_queue(key))


class Notifier(Outbox):
    """Publishes to :data:`CHANNEL`, best effort."""

    name = "notifications"

    def notify(self, job: str, seq: int) -> None:
        """Announce that ``job`` changed; its newest event is ``seq``. Never blocks and never fails."""
        self.put(job, seq)

    def _deliver(self, client: redis.Redis, key: str, number: int) -> None:
        client.publish(CHANNEL, json.dumps({"job": key, "seq": number}))


def main() -> None:
    """``python -m services.jobs.signals``: exit with a message unless the Redis of ``REDIS_URL`` answers."""
    try:
        check_redis(os.environ.get("REDIS_URL", ""))
    except EthogramError as error:
        sys.stderr.write(f"{error.message}\n")
        raise SystemExit(os.EX_USAGE if isinstance(error, InvalidInput) else os.EX_UNAVAILABLE) from None


if __name__ == "__main__":
    main()

"""Messages to Redis, sent from a thread of their own so that nobody waits for it."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

V = TypeVar("V")


class Outbox(ABC, Generic[V]):
    """Delivers ``(key, value)`` pairs in a thread of its own; of a key's values only the newest.

    What cannot be delivered is dropped, with one warning per outage: each message is only a hint, and the truth is in
    the database.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: dict[str, V] = {}
        self._changed = threading.Condition()
        self._busy = self._broken = self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, key: str, value: V) -> None:
        """Deliver soon. Never blocks and never fails."""
        with self._changed:
            self._waiting[key] = value
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

    @abstractmethod
    def _deliver(self, key: str, value: V) -> None:
        """Send one message; called in the thread, and may raise."""

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                waiting, self._waiting, self._busy = self._waiting, {}, True
            try:
                for key, value in waiting.items():
                    self._deliver(key, value)
                if self._broken:
                    logger.info("Redis answers again", extra={"outbox": self._name})
                self._broken = False
            except Exception as error:
                if not self._broken:
                    logger.warning(
                        "Redis does not answer, so the %s cannot be sent. Nothing is lost: jobs start and show later. "
                        "Start Redis again, or set REDIS_URL",
                        self._name,
                        extra={"error": str(error)[:300]},
                    )
                self._broken = True
                time.sleep(0.2)

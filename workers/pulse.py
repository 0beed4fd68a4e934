"""Heartbeats of an attempt."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from ethogram.errors import StaleAttempt
from services.jobs.registry import Claim, JobRegistry
from workers.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3


class Pulse:
    """Renews the lease on its own timer and learns whether the job is to be cancelled.

    Events of the job do not count: a job that compiles for minutes sends none, and is alive.
    """

    def __init__(self, registry: JobRegistry, claim: Claim, metrics: WorkerMetrics) -> None:
        self.cancel, self.stale = threading.Event(), threading.Event()
        self._registry, self._attempt, self._metrics = registry, claim.attempt, metrics
        self._interval = claim.lease_seconds / BEATS_PER_LEASE
        self._done = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """How long the attempt has run."""
        return time.monotonic() - self._began

    def _beat(self) -> None:
        while not self._done.wait(self._interval):
            try:
                if self._registry.heartbeat(self._attempt, self.seconds):
                    self.cancel.set()
            except StaleAttempt:
                self.stale.set()
                return
            except Exception:
                # The registry may answer at the next beat; if it does so too late, the fence protects the job.
                self._metrics.missed.inc()
                logger.warning("no heartbeat", extra={"attempt": self._attempt}, exc_info=True)

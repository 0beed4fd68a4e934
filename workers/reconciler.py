"""The reconciler repairs what a crash left: attempts whose worker is gone, jobs in a back-off, and queues whose ring
was lost. :mod:`workers.collector`, in the same process, deletes artifacts that nothing needs.

An attempt is alive while its heartbeat counter moves. How long a counter has stood still, and how long a job has
backed off, is measured on this process's monotonic clock: setting a machine's clock neither ends an attempt nor delays
a job. Any number of reconcilers may run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

from ethogram.errors import StaleAttempt, Unavailable
from services.jobs.registry import JobRegistry
from services.jobs.signals import Bell, Notifier
from services.runtime.exporter import serve_metrics
from services.runtime.lifetime import run_process
from workers import collector
from workers.metrics import ReconcilerMetrics
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 1.0
# A lost attempt is found within two leases, however short they are.
LOOKS_PER_LEASE = 4
LEAVE_SECONDS = 2.0


class Reconciler:
    """Looks at the registry every ``period`` seconds."""

    def __init__(
        self,
        registry: JobRegistry,
        bell: Bell,
        notifier: Notifier,
        metrics: ReconcilerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._registry, self._bell, self._notifier, self._clock = registry, bell, notifier, clock
        self._unchanged: dict[tuple[str, int], float] = {}
        """(attempt, heartbeat) or (job, claims) -> how long it has been seen so, in seconds."""
        self._looked = clock()
        self.period = PERIOD_SECONDS

    def look(self) -> None:
        """Release lost attempts, end back-offs, and ring queues with work. Raises :class:`Unavailable`."""
        now = self._clock()
        # Time that this process itself slept does not count.
        elapsed, self._looked = min(now - self._looked, 2 * self.period), now
        running, waiting = self._registry.running_attempts(), self._registry.backing_off()
        before = self._unchanged
        seen = [*((a.attempt, a.heartbeat) for a in running), *((b.job, b.claims) for b in waiting)]
        self._unchanged = {key: before[key] + elapsed if key in before else 0.0 for key in seen}
        for attempt in running:
            seconds = self._unchanged[attempt.attempt, attempt.heartbeat]
            if seconds > attempt.lease_seconds:
                self._release(attempt.attempt, attempt.worker, seconds)
        # This process ends back-offs by its own clock, the registry itself by the wall clock.
        for backoff in waiting:
            if self._unchanged[backoff.job, backoff.claims] >= backoff.seconds:
                job = self._registry.wake(backoff.job, backoff.claims)
                if job is not None:
                    self._metrics.woken.inc()
                    self._notifier.notify(job.id, job.seq)
        self.period = min([PERIOD_SECONDS, *(attempt.lease_seconds / LOOKS_PER_LEASE for attempt in running)])
        for queue in self._registry.queues_with_work():
            self._bell.ring(queue)
            self._metrics.rings.inc()
        self._metrics.looks.inc()

    def _release(self, attempt: str, worker: str, seconds: float) -> None:
        try:
            job = self._registry.release(attempt, "lost", f"no heartbeat from its worker {worker} for {seconds:.0f} s")
        except StaleAttempt:
            return  # It ended in this moment.
        except Unavailable:
            # Workers cannot write heartbeats either: after the outage, every attempt has its whole lease again.
            self._unchanged = {}
            raise
        self._metrics.lost.inc()
        logger.warning("attempt lost", extra={"job": job.id, "attempt": attempt, "worker": worker})
        self._notifier.notify(job.id, job.seq)


def run(reconciler: Reconciler, metrics: ReconcilerMetrics, stopping: threading.Event) -> None:
    """Look until ``stopping``."""
    broken = False
    while not stopping.wait(reconciler.period):
        try:
            reconciler.look()
            if broken:
                logger.info("the registry answers again")
            broken = False
        except Unavailable as error:
            metrics.failures.inc()
            if not broken:
                logger.error(error.message)
            broken = True


def serve(config: WorkerSettings, stopping: threading.Event) -> None:
    """Reconcile, and collect in a thread, until ``stopping``."""
    metrics = ReconcilerMetrics()
    with (
        closing(JobRegistry.open(config.database)) as registry,
        closing(Notifier(config.redis_url)) as notifier,
        closing(Bell(config.redis_url)) as bell,
        serve_metrics(metrics.registry, config),
    ):
        collecting = threading.Thread(
            target=collector.run, args=[registry, config, metrics, stopping], name="collector", daemon=True
        )
        collecting.start()
        logger.info("reconciler ready")
        run(Reconciler(registry, bell, notifier, metrics), metrics, stopping)
        # A collection may take long; it can be interrupted at any point.
        collecting.join(LEAVE_SECONDS)


def main() -> None:
    """``python -m workers.reconciler``."""
    stopping = threading.Event()
    start = partial(serve, stopping=stopping)
    run_process("workers.reconciler", "reconciler", WorkerSettings, start, stopping.set, failure=2)


if __name__ == "__main__":
    main()

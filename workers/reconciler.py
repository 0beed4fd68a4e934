"""Puts right what a crash left: attempts whose worker is gone, jobs that wait to be tried again, and queues whose bell
was lost; :mod:`workers.collector` beside it puts the artifact store right.

An attempt lives as long as its heartbeat counter moves. How long it has stood still, and how long a job has waited, is
measured on this process's own monotonic clock, so no clock that is set, here or there, ends an attempt or holds a job.
Any number of reconcilers may run.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ethogram.errors import EthogramError, StaleAttempt, Unavailable
from services.jobs.bell import Bell
from services.jobs.notify import Notifier
from services.jobs.registry import JobRegistry
from services.runtime import lifetime, logs
from workers import collector
from workers.metrics import ReconcilerMetrics, served
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 1.0
# Leases are short in tests; a look per quarter of one finds a lost attempt within two.
LOOKS_PER_LEASE = 4
LEAVE_SECONDS = 2.0


@dataclass
class Watched:
    """An attempt as last seen."""

    heartbeat: int
    still: float
    """Seconds that it has stood still, as far as this process was awake to see."""


class Reconciler:
    """Looks at the registry now and then."""

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
        self._watched: dict[str, Watched] = {}
        self._waited: dict[tuple[str, int], float] = {}
        self._looked = clock()
        self.period = PERIOD_SECONDS

    def look(self) -> None:
        """Release what is lost, wake what has waited, and ring where there is work. Raises :class:`Unavailable`."""
        now = self._clock()
        # A process that slept itself has seen nobody stand still meanwhile.
        passed, self._looked = min(now - self._looked, 2 * self.period), now
        running = self._registry.running_attempts()
        seen: dict[str, Watched] = {}
        for attempt in running:
            before = self._watched.get(attempt.attempt)
            moved = before is None or before.heartbeat != attempt.heartbeat
            still = 0.0 if before is None or moved else before.still + passed
            seen[attempt.attempt] = Watched(attempt.heartbeat, still)
            if still > attempt.lease_seconds:
                self._release(attempt.attempt, attempt.worker, still)
        self._watched = seen
        self._wake(passed)
        self.period = min([PERIOD_SECONDS, *(attempt.lease_seconds / LOOKS_PER_LEASE for attempt in running)])
        for queue in self._registry.queues_with_work():
            self._bell.ring(queue)
            self._metrics.rings.inc()
        self._metrics.looks.inc()

    def _wake(self, passed: float) -> None:
        """End the back-offs that have stood for their seconds; the registry itself ends them by the wall clock."""
        waited: dict[tuple[str, int], float] = {}
        for back in self._registry.backing_off():
            before = self._waited.get((back.job, back.claims))
            seconds = waited[back.job, back.claims] = 0.0 if before is None else before + passed
            if seconds >= back.seconds:
                job = self._registry.wake(back.job, back.claims)
                if job is not None:
                    self._metrics.woken.inc()
                    self._notifier.notify(job.id, job.seq)
        self._waited = waited

    def _release(self, attempt: str, worker: str, still: float) -> None:
        try:
            job = self._registry.release(attempt, "lost", f"its worker {worker} has not been heard for {still:.0f} s")
        except StaleAttempt:
            return  # Ended at this very moment.
        except Unavailable:
            # Who cannot write hears no heartbeat either: when it can be written again, all have their whole lease.
            self._watched = {}
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


def main() -> None:
    """``python -m workers.reconciler``."""
    parser = argparse.ArgumentParser(prog="python -m workers.reconciler", description=__doc__)
    parser.add_argument("--parent-pipe", action="store_true", help="leave when standard input ends")
    arguments = parser.parse_args()
    logs.configure("reconciler")
    stopping = threading.Event()

    def leave(*_: Any) -> None:
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        config = WorkerSettings.read()
        logs.configure("reconciler", config.log_level)
        if arguments.parent_pipe:
            lifetime.exit_on_eof(lambda: os.kill(os.getpid(), signal.SIGTERM))
        registry = JobRegistry.open(config.database)
        bell, notifier = Bell(config.redis_url), Notifier(config.redis_url)
        metrics = ReconcilerMetrics()
        with served(metrics, config):
            housekeeping = threading.Thread(
                target=collector.run, args=[registry, config, metrics, stopping], name="collector", daemon=True
            )
            housekeeping.start()
            logger.info("reconciler ready")
            run(Reconciler(registry, bell, notifier, metrics), metrics, stopping)
            # What it is at may take long; it can be left at any point.
            housekeeping.join(LEAVE_SECONDS)
        bell.close()
        notifier.close()
        registry.close()
    except EthogramError as error:
        logger.critical(error.message)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

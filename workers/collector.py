"""The reconciler's collector, in a thread of its own: it deletes old jobs, then artifacts that nothing needs.

A long collection delays nothing else, and an interrupted one resumes in the next process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from ethogram.errors import EthogramError, IllegalState, NotFound
from services.artifacts.collect import Collector, Needs
from services.artifacts.remote import uptime
from services.artifacts.store import ArtifactStore
from services.jobs.registry import JobRegistry
from workers.metrics import ReconcilerMetrics
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

# Without collection, the store is still claimed, so that no other registry's collector takes it.
IDLE_SECONDS = 600.0
# After a larger step of the wall clock, the age of a job is unknown.
CLOCK_STEP_SECONDS = 60.0


class Housekeeper:
    """Deletes old jobs and unneeded artifacts."""

    def __init__(
        self,
        registry: JobRegistry,
        store: ArtifactStore,
        config: WorkerSettings,
        metrics: ReconcilerMetrics,
        *,
        clock: Callable[[], float] = uptime,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._registry, self._store, self._config, self._metrics = registry, store, config, metrics
        self._clock, self._wall = clock, wall
        self._offset = wall() - clock()
        self._warned = False
        self._collector = Collector(
            store, self._needs, registry.forget, grace_seconds=config.gc_grace_seconds, clock=clock
        )

    def look(self) -> None:
        """Delete what may be deleted now. Raises what :meth:`Collector.collect` raises, and :class:`IllegalState` when
        the store belongs to another registry."""
        self._store.claim(self._registry.identity())
        if not self._config.gc_period_seconds:
            return
        if self._config.retention_days:
            self._delete_old_jobs()
        done = self._collector.collect()
        if done.files or done.artifacts:
            self._metrics.collected.inc(done.artifacts)
            self._metrics.freed.inc(done.bytes)
            logger.info("deleted artifacts that nothing needs", extra=asdict(done))

    def _delete_old_jobs(self) -> None:
        if abs(self._wall() - self._clock() - self._offset) > CLOCK_STEP_SECONDS:
            if not self._warned:
                logger.warning(
                    "the clock of this machine was set: old jobs are not deleted until the reconciler is restarted"
                )
            self._warned = True
            return
        oldest = datetime.fromtimestamp(self._wall(), UTC) - timedelta(days=self._config.retention_days)
        published = self._store.published()
        deleted = 0
        for job in self._registry.jobs_ended_before(oldest):
            try:
                self._registry.delete_job(job, published)
            except (IllegalState, NotFound):
                # Another job still uses it, or another process deleted it first.
                continue
            deleted += 1
        if deleted:
            logger.info("deleted old jobs", extra={"jobs": deleted})

    def _needs(self) -> Needs:
        # In this order: an attempt that ends after the first query has committed what the third one returns.
        attempts = {attempt.attempt for attempt in self._registry.running_attempts()}
        spent = self._registry.spent_artifacts()
        return Needs(live=self._registry.live_artifacts(), attempts=attempts, spent=spent)


def run(registry: JobRegistry, config: WorkerSettings, metrics: ReconcilerMetrics, stopping: threading.Event) -> None:
    """Collect every ``config.gc_period_seconds`` until ``stopping``, whatever fails."""
    keeper: Housekeeper | None = None
    failed = ""
    while True:
        try:
            keeper = keeper or Housekeeper(registry, ArtifactStore(config.store_url), config, metrics)
            keeper.look()
            failed = ""
        except EthogramError as error:
            # Log it once, not every ten minutes.
            if error.message != failed:
                logger.error(error.message)
            failed = error.message
        except Exception:
            logger.exception("the collection failed; it starts again")
        if stopping.wait(config.gc_period_seconds or IDLE_SECONDS):
            return

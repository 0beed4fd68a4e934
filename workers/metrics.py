"""What workers and reconcilers tell Prometheus, each on a port of its own (``ETHOGRAM_METRICS_PORT``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ethogram.errors import Conflict
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)


class WorkerMetrics:
    """Of one worker."""

    def __init__(self, slots: int) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        Gauge("ethogram_worker_slots", "Jobs that this worker runs at most.", registry=own).set(slots)
        self.busy = Gauge("ethogram_worker_busy_slots", "Jobs that this worker runs.", registry=own)
        self.rings = Counter("ethogram_worker_rings", "Rings of the bell that were heard.", registry=own)
        self.claims = Counter("ethogram_worker_claims", "Jobs that were claimed.", ["queue"], registry=own)
        self.attempts = Counter(
            "ethogram_worker_attempts",
            "Attempts that ended, by how; taken: another worker has the job, or its end could not be written.",
            ["kind", "outcome"],
            registry=own,
        )
        self.seconds = Histogram(
            "ethogram_worker_attempt_seconds", "Running time of attempts.", ["kind"], buckets=_SECONDS, registry=own
        )
        self.events = Counter("ethogram_worker_events", "Lines of jobs' logs that were written down.", registry=own)
        self.checkpoints = Counter("ethogram_worker_checkpoints", "Checkpoints that were committed.", registry=own)
        self.missed = Counter("ethogram_worker_missed_heartbeats", "Heartbeats that failed.", registry=own)
        self.retries = Counter(
            "ethogram_worker_write_retries", "Writes that the registry did not take at once.", registry=own
        )


class ReconcilerMetrics:
    """Of one reconciler."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.looks = Counter("ethogram_reconciler_looks", "Looks at the registry.", registry=own)
        self.failures = Counter(
            "ethogram_reconciler_failed_looks", "Looks that the registry did not answer.", registry=own
        )
        self.lost = Counter("ethogram_reconciler_lost_attempts", "Attempts whose worker was gone.", registry=own)
        self.woken = Counter("ethogram_reconciler_ended_backoffs", "Back-offs that were ended.", registry=own)
        self.rings = Counter("ethogram_reconciler_rings", "Queues that were rung.", registry=own)
        self.collected = Counter("ethogram_collected_artifacts", "Artifacts that were deleted.", registry=own)
        self.freed = Counter("ethogram_collected_bytes", "Bytes that were freed in the store.", registry=own)


@contextmanager
def served(metrics: WorkerMetrics | ReconcilerMetrics, settings: WorkerSettings) -> Iterator[int]:
    """Tell Prometheus for the length of the block; the port, 0 when none is set.

    Raises :class:`Conflict` when the port is taken.
    """
    if not settings.metrics_port:
        yield 0
        return
    try:
        server, thread = start_http_server(settings.metrics_port, settings.metrics_host, registry=metrics.registry)
    except OSError as error:
        raise Conflict(
            f"metrics cannot be served on {settings.metrics_host}:{settings.metrics_port} ({error.strerror}): set "
            "ETHOGRAM_METRICS_PORT to a free port, or to 0 for none"
        ) from None
    logger.info("metrics", extra={"port": server.server_port})
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()

"""Prometheus metrics of workers and reconcilers, each on a port of its own (``ETHOGRAM_METRICS_PORT``)."""

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
    """Metrics of one worker."""

    def __init__(self, slots: int) -> None:
        registry = self.registry = CollectorRegistry()
        Gauge("ethogram_worker_slots", "Most jobs that this worker runs at once.", registry=registry).set(slots)
        self.busy = Gauge("ethogram_worker_busy_slots", "Jobs that this worker runs now.", registry=registry)
        self.rings = Counter("ethogram_worker_rings", "Rings received.", registry=registry)
        self.claims = Counter("ethogram_worker_claims", "Jobs claimed.", ["queue"], registry=registry)
        self.attempts = Counter(
            "ethogram_worker_attempts",
            "Attempts that ended, by outcome; taken: another worker has the job, or the end could not be written.",
            ["kind", "outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "ethogram_worker_attempt_seconds",
            "Running time of attempts.",
            ["kind"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.events = Counter("ethogram_worker_events", "Log lines of jobs written to the registry.", registry=registry)
        self.checkpoints = Counter("ethogram_worker_checkpoints", "Checkpoints committed.", registry=registry)
        self.missed = Counter("ethogram_worker_missed_heartbeats", "Heartbeats that failed.", registry=registry)
        self.retries = Counter(
            "ethogram_worker_write_retries", "Writes to the registry that were tried again.", registry=registry
        )


class ReconcilerMetrics:
    """Metrics of one reconciler."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.looks = Counter("ethogram_reconciler_looks", "Looks at the registry.", registry=registry)
        self.failures = Counter(
            "ethogram_reconciler_failed_looks", "Looks that the registry did not answer.", registry=registry
        )
        self.lost = Counter("ethogram_reconciler_lost_attempts", "Attempts whose worker was gone.", registry=registry)
        self.woken = Counter("ethogram_reconciler_ended_backoffs", "Back-offs ended.", registry=registry)
        self.rings = Counter("ethogram_reconciler_rings", "Queues rung.", registry=registry)
        self.collected = Counter("ethogram_collected_artifacts", "Artifacts deleted.", registry=registry)
        self.freed = Counter("ethogram_collected_bytes", "Bytes freed in the store.", registry=registry)


@contextmanager
def serve_metrics(metrics: WorkerMetrics | ReconcilerMetrics, settings: WorkerSettings) -> Iterator[int]:
    """Serve ``metrics`` within the block; yields the port, 0 when none is set.

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

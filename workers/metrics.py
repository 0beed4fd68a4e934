"""Prometheus metrics of workers and reconcilers."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)


class WorkerMetrics:
    """Metrics of one worker."""

    def __init__(self, slots: int) -> None:
        registry = self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="ethogram", subsystem="worker", registry=registry)
        gauge = partial(Gauge, namespace="ethogram", subsystem="worker", registry=registry)
        gauge("slots", "Most jobs that this worker runs at once.").set(slots)
        self.busy = gauge("busy_slots", "Jobs that this worker runs now.")
        self.rings = counter("rings", "Rings received.")
        self.claims = counter("claims", "Jobs claimed.", ["queue"])
        meaning = "Attempts that ended, by outcome; taken: another worker has the job, or the end could not be written."
        self.attempts = counter("attempts", meaning, ["kind", "outcome"])
        self.seconds = Histogram(
            "ethogram_worker_attempt_seconds", "Run time of attempts.", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.events = counter("events", "Log lines of jobs written to the registry.")
        self.checkpoints = counter("checkpoints", "Checkpoints committed.")
        self.missed = counter("missed_heartbeats", "Heartbeats that failed.")
        self.retries = counter("write_retries", "Writes to the registry that were tried again.")


class ReconcilerMetrics:
    """Metrics of one reconciler."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="ethogram", registry=self.registry)
        self.looks = counter("reconciler_looks", "Looks at the registry.")
        self.failures = counter("reconciler_failed_looks", "Looks that the registry did not answer.")
        self.lost = counter("reconciler_lost_attempts", "Attempts whose worker was gone.")
        self.woken = counter("reconciler_ended_backoffs", "Back-offs ended.")
        self.rings = counter("reconciler_rings", "Queues rung.")
        self.collected = counter("collected_artifacts", "Artifacts deleted.")
        self.freed = counter("collected_bytes", "Bytes freed in the store.")

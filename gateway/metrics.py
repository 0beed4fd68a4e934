"""Prometheus metrics of the gateway itself, and of the queues in the registry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ethogram.errors import Unavailable
from services.jobs.registry import Depth, JobRegistry

UNKNOWN = "unknown"
"""Label of requests that no route takes, so that arbitrary paths do not become labels."""
_KEEP_SECONDS = 1.0
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


class GatewayMetrics:
    """Counters of one application, which may not be the only one in its process."""

    def __init__(self, registry: JobRegistry, streams: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="ethogram", registry=self.registry)
        request = ["method", "route"]
        self.requests = counter("http_requests", "Answered requests, by route template.", [*request, "status"])
        text = "Time from a request to the end of its answer, without event streams."
        histogram = partial(Histogram, namespace="ethogram", buckets=_SECONDS, registry=self.registry)
        self.seconds = histogram("http_request_seconds", text, request)
        self.sent = counter("stream_bytes", "Bytes of events sent to watchers.")
        Gauge("ethogram_streams", "Open event streams.", registry=self.registry).set_function(streams)
        self.registry.register(QueueCollector(registry))


class QueueCollector(Collector):
    """Reads the registry when Prometheus scrapes, at most once a second. All gateways report the same numbers."""

    def __init__(self, registry: JobRegistry) -> None:
        self._registry, self._lock = registry, threading.Lock()
        self._depths: list[Depth] | None = []
        self._until = 0.0

    def collect(self) -> Iterator[Metric]:
        """The queues now; without a database, ``ethogram_registry_up`` 0 alone."""
        with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._depths = self._registry.depths()
                except Unavailable:
                    self._depths = None
                self._until = time.monotonic() + _KEEP_SECONDS
            depths = self._depths
        jobs = GaugeMetricFamily(
            "ethogram_jobs",
            "Jobs that have not ended: ready to be claimed, held back (by inputs, children, a back-off or their time "
            "to start), running, or being cancelled.",
            labels=["queue", "state"],
        )
        oldest = GaugeMetricFamily(
            "ethogram_queue_oldest_ready_seconds",
            "Age of the oldest job that could be claimed; 0 when there is none.",
            labels=["queue"],
        )
        for depth in depths or []:
            for state in ("ready", "held", "running", "cancelling"):
                jobs.add_metric([depth.queue, state], getattr(depth, state))
            oldest.add_metric([depth.queue], depth.oldest_ready_seconds)
        up = float(depths is not None)
        yield from (jobs, oldest)
        yield GaugeMetricFamily("ethogram_registry_up", "1 if the database answers, else 0.", value=up)

"""Prometheus metrics of an inference server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class InferenceMetrics:
    """Metrics of one server; ``models`` and ``pending`` tell what it holds now."""

    def __init__(self, *, models: Callable[[], int], pending: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        histogram = partial(Histogram, namespace="ethogram", subsystem="inference", registry=registry)
        gauge = partial(Gauge, namespace="ethogram", subsystem="inference", registry=registry)
        text = "Calls that ended, by method and gRPC code."
        self.calls = Counter("ethogram_inference_calls", text, ["method", "code"], registry=registry)
        self.seconds = histogram("call_seconds", "Time of a call, streams as a whole.", ["method"], buckets=_SECONDS)
        text = "Time that a part of a request waits for the device."
        self._queue = histogram("queue_seconds", text, buckets=_SECONDS)
        self._compute = histogram("compute_seconds", "Time of a batch on the device.", buckets=_SECONDS)
        self._rows = histogram("batch_rows", "Rows in a batch.", buckets=_ROWS)
        gauge("pending_rows", "Rows that wait or are computed.").set_function(pending)
        gauge("models", "Models in memory.").set_function(models)

    def batch(self, waits: Sequence[float], seconds: float, rows: int) -> None:
        """Count a batch of so many ``rows``, whose parts waited so long, and which took ``seconds``."""
        for wait in waits:
            self._queue.observe(wait)
        self._compute.observe(seconds)
        self._rows.observe(rows)

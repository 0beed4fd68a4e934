"""Prometheus metrics of a process that has no HTTP server of its own, on the port ``ETHOGRAM_METRICS_PORT``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server

from ethogram.errors import Conflict
from services.runtime.settings import ExporterSettings

logger = logging.getLogger(__name__)


@contextmanager
def serve_metrics(registry: CollectorRegistry, settings: ExporterSettings) -> Iterator[int]:
    """Serve ``registry`` at ``GET /metrics`` within the block; yields the port, 0 when none is set.

    Raises :class:`Conflict` when the port is taken.
    """
    if not settings.metrics_port:
        yield 0
        return
    try:
        server, thread = start_http_server(settings.metrics_port, settings.metrics_host, registry=registry)
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

"""The parts of the platform that the routes use, opened once per process."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import Depends, Request

from gateway.metrics import GatewayMetrics
from gateway.settings import GatewaySettings
from gateway.tail import Tails
from services.artifacts.store import ArtifactStore
from services.jobs.records import Job
from services.jobs.registry import JobRegistry
from services.jobs.signals import Bell, Notifier
from services.runtime import scratch

TENANT = "default"
"""The one tenant; there is no sign-in yet."""
# Three parts are checked at once, and two probes may overlap.
CHECKERS = 6


class Services:
    """Registry, store, queue and streams of one gateway."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Open all and migrate the database. Raises :class:`EthogramError` when the database or the store cannot be
        used, or the Redis URL is invalid."""
        self._stack = ExitStack()
        self.settings = settings
        self.registry = JobRegistry.open(settings.database)
        self.tails = Tails(self.registry, settings.redis_url, settings.stream_limit)
        self.metrics = GatewayMetrics(self.registry, lambda: self.tails.streams)
        self.checks = self._stack.enter_context(ThreadPoolExecutor(CHECKERS, thread_name_prefix="readyz"))
        """Threads for readiness checks, so that a probe answers even when a part hangs."""
        self.checking: dict[str, Future[Any]] = {}
        """The last check of each part; it may still run."""
        self.store = ArtifactStore(settings.store_url)
        self.bell, self.notifier = Bell(settings.redis_url), Notifier(settings.redis_url)
        self.work = self._stack.enter_context(scratch.folder(settings.work, "gateway"))
        """Scratch folder of uploads."""

    def close(self) -> None:
        """Close all but the streams."""
        for part in (self.bell, self.notifier, self.registry, self._stack):
            part.close()

    def announce(self, job: Job) -> None:
        """Announce a committed change to watchers here, other gateways and idle workers. Never waits for Redis."""
        self.tails.wake(job.id)
        self.notifier.notify(job.id, job.seq)
        if not job.state.terminal:
            self.bell.ring(job.queue)


def _of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Parts = Annotated[Services, Depends(_of)]
"""Parameter of a route: the services of its application."""

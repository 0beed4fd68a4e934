"""The parts of the platform that the routes use, opened once per process."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from gateway.metrics import GatewayMetrics
from gateway.settings import GatewaySettings
from gateway.tail import Tails
from services.artifacts.store import ArtifactStore
from services.jobs.records import Job
from services.jobs.registry import JobRegistry
from services.jobs.signals import Bell, Notifier

TENANT = "default"
"""The one tenant; there is no sign-in yet."""


@dataclass(frozen=True)
class Services:
    """Registry, store, queue and streams of one gateway."""

    settings: GatewaySettings
    registry: JobRegistry
    store: ArtifactStore
    bell: Bell
    notifier: Notifier
    tails: Tails
    metrics: GatewayMetrics
    checks: ThreadPoolExecutor
    """Threads for readiness checks, so that a probe answers even when a part hangs."""
    checking: dict[str, Future[Any]]
    """The last check of each part; it may still run."""
    work: Path
    """Scratch folder of uploads."""

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

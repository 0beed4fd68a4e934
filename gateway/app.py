"""The FastAPI application: routes, error handlers, middleware and the parts they use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager

import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute

from gateway import problems
from gateway.inputs import storable
from gateway.metrics import GatewayMetrics
from gateway.middleware import BodyLimit, RequestContext
from gateway.routes import artifacts, events, jobs, meta, models
from gateway.services import Services
from gateway.settings import GatewaySettings
from gateway.tail import Tails
from services.artifacts.store import ArtifactStore
from services.jobs.registry import JobRegistry
from services.jobs.signals import Bell, Notifier
from services.runtime import scratch

# Three parts are checked at once, and two probes may overlap.
CHECKERS = 6
_ERROR = {"model": problems.Problem, "content": {problems.MEDIA_TYPE: {}}}


def create_app(settings: GatewaySettings) -> FastAPI:
    """The gateway's application, with the database migrated; ``app.state.services`` is open until the lifespan ends.

    Raises :class:`EthogramError` when the database or the store cannot be used, or the Redis URL is invalid.
    """
    stack = ExitStack()
    registry = JobRegistry.open(settings.database)
    tails = Tails(registry, settings.redis_url, settings.stream_limit)
    metrics = GatewayMetrics(registry, lambda: tails.streams)
    checks = stack.enter_context(ThreadPoolExecutor(CHECKERS, thread_name_prefix="readyz"))
    services = Services(
        settings=settings,
        registry=registry,
        store=ArtifactStore(settings.store_url),
        bell=Bell(settings.redis_url),
        notifier=Notifier(settings.redis_url),
        tails=tails,
        metrics=metrics,
        checks=checks,
        checking={},
        work=stack.enter_context(scratch.folder(settings.work, "gateway")),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.tails.start()
        try:
            yield
        finally:
            await services.tails.stop()
            for part in (services.bell, services.notifier, registry):
                await anyio.to_thread.run_sync(part.close)
            stack.close()

    app = FastAPI(
        title="Ethogram",
        summary="Record, encode, steer and explain the behaviour of neural networks",
        lifespan=lifespan,
        dependencies=[Depends(storable)],
        generate_unique_id_function=_operation_id,
        responses={
            422: {**_ERROR, "description": "Invalid fields, each with the reason"},
            "default": {**_ERROR, "description": "The error"},
        },
    )
    app.state.services = services
    for module in (jobs, events, artifacts, models, meta):
        app.include_router(module.router)
    problems.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=settings.body_limit, exceptions={"/v1/artifacts": settings.upload_limit})
    app.add_middleware(RequestContext, metrics=metrics)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name

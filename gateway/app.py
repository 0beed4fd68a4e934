"""The FastAPI application: routes, error handlers, middleware and the parts they use."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import Depends, FastAPI

from gateway import openapi, problems
from gateway.inputs import storable
from gateway.middleware import BodyLimit, OriginCheck, RequestContext
from gateway.routes import artifacts, jobs, meta, models
from gateway.services import Services
from gateway.settings import GatewaySettings, is_loopback

_ERROR = {"model": problems.Problem, "content": {problems.MEDIA_TYPE: {}}}


def create_app(settings: GatewaySettings) -> FastAPI:
    """The gateway's application, with the database migrated; ``app.state.services`` is open until the lifespan ends.

    Raises :class:`EthogramError` when the database or the store cannot be used, or the Redis URL is invalid.
    """
    services = Services(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.tails.start()
        try:
            yield
        finally:
            await services.tails.stop()
            await anyio.to_thread.run_sync(services.close)

    app = FastAPI(
        title="Ethogram",
        summary="Record, encode, steer and explain the behaviour of neural networks",
        lifespan=lifespan,
        dependencies=[Depends(storable)],
        generate_unique_id_function=lambda route: route.name,
        responses={
            422: {**_ERROR, "description": "Invalid fields, each with the reason"},
            "default": {**_ERROR, "description": "The error"},
        },
    )
    app.state.services = services
    for module in (jobs, artifacts, models, meta):
        app.include_router(module.router)
    problems.install(app)
    openapi.install(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=settings.body_limit, exceptions={"/v1/artifacts": settings.upload_limit})
    app.add_middleware(OriginCheck, hosts=settings.hosts, on_loopback=is_loopback(settings.host))
    app.add_middleware(RequestContext, metrics=services.metrics)
    return app

"""The platform itself: health, readiness, metrics, kinds of jobs, version."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import wait
from functools import lru_cache
from typing import Any, Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from ethogram.errors import EthogramError, Unavailable
from ethogram.specs.kinds import KINDS
from gateway.services import Parts
from services.artifacts.store import code_version
from services.jobs.signals import check_redis

logger = logging.getLogger(__name__)

router = APIRouter(tags=["platform"])

CHECK_SECONDS = 3.0


class Check(BaseModel):
    """The check of one part that the gateway needs."""

    name: str
    ok: bool
    detail: str
    """What is wrong and what to do; empty if `ok`."""


class Readiness(BaseModel):
    """Whether requests can be served."""

    status: Literal["ready", "not ready"]
    checks: list[Check]


class KindOut(BaseModel):
    """One kind of job."""

    name: str
    summary: str
    queue: str
    """Machine class that runs it unless the submission says otherwise."""
    spec_schema: dict[str, Any] = Field(serialization_alias="schema")
    """JSON Schema of its spec."""


class Info(BaseModel):
    """The version, and the address of the inference service."""

    version: str
    inference: str
    """``host:port`` of the inference service (gRPC)."""


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Whether the process is alive."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Some part is missing"}})
def readyz(services: Parts, response: Response) -> Readiness:
    """Whether the database, the artifact store and Redis can be used, and what to do about each that cannot."""
    checks: dict[str, Callable[[], object]] = {
        "database": lambda: services.registry.has_work("cpu"),
        "store": services.store.check_writable,
        "redis": lambda: _check_redis(services.settings.redis_url),
    }
    for name, check in checks.items():
        # A check that still runs is not started again: a hanging part must not take the threads of the others.
        if name not in services.checking or services.checking[name].done():
            services.checking[name] = services.checks.submit(_check, name, check)
    futures = dict(services.checking)
    wait(futures.values(), CHECK_SECONDS)
    late = f"did not answer within {CHECK_SECONDS:g} s: see that it runs and is not overloaded"
    results = [f.result() if f.done() else Check(name=name, ok=False, detail=late) for name, f in futures.items()]
    ready = all(check.ok for check in results)
    response.status_code = 200 if ready else 503
    return Readiness(status="ready" if ready else "not ready", checks=results)


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
def metrics(services: Parts) -> Response:
    """Prometheus metrics of this gateway and of the queues."""
    return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/kinds")
@lru_cache(maxsize=1)
def kinds() -> list[KindOut]:
    """The kinds of jobs, with the JSON Schema of their specs."""
    return [
        KindOut(name=kind.name, summary=kind.summary, queue=kind.queue, spec_schema=kind.spec.model_json_schema())
        for kind in KINDS.values()
    ]


@router.get("/v1/info")
def info(services: Parts) -> Info:
    """The platform's version and the address of its inference service."""
    return Info(version=code_version(), inference=services.settings.inference)


def _check(name: str, check: Callable[[], object]) -> Check:
    try:
        check()
    except EthogramError as error:
        return Check(name=name, ok=False, detail=error.message)
    except Exception:
        logger.exception("readiness check failed", extra={"check": name})
        return Check(name=name, ok=False, detail="cannot be used; the gateway's log has the cause")
    return Check(name=name, ok=True, detail="")


def _check_redis(url: str) -> None:
    try:
        check_redis(url)
    except Unavailable as error:
        raise Unavailable(f"{error.message}; jobs are still accepted, and begin when it is back") from None

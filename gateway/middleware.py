"""Middleware around every route, as plain ASGI so that nothing is buffered between server and route."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ethogram.errors import Internal
from gateway.metrics import UNKNOWN, GatewayMetrics
from gateway.problems import problem
from gateway.sse import EVENT_STREAM

logger = logging.getLogger(__name__)

HEADER = b"x-request-id"
_WELL_FORMED = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestContext:
    """Counts and logs each request and gives it an id (the client's ``X-Request-ID`` if well formed); answers an
    unexpected exception with that id alone."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _WELL_FORMED.fullmatch(given) else secrets.token_hex(8)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        began, status, streams = time.perf_counter(), 0, False

        async def send_with_id(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = Headers(raw=message.get("headers", [])).get("content-type", "").startswith(EVENT_STREAM)
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id.encode())]
            elif streams:
                self.metrics.sent.inc(len(message.get("body", b"")))
            await send(message)

        # Percent-encoded as received, so that a path cannot forge a log line.
        line = {"request_id": request_id, "method": scope["method"], "path": scope["raw_path"].decode("latin-1")}
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("request failed", extra=line)
            if not status:
                text = "something is wrong inside the gateway; its log has the cause under this request's id"
                await problem(Internal(text), request_id)(scope, receive, send_with_id)
        finally:
            quiet = scope["path"] in _PROBES and status < 400
            seconds = round(time.perf_counter() - began, 4)
            route = getattr(scope.get("route"), "path", UNKNOWN)
            method = scope["method"] if scope["method"] in _METHODS else UNKNOWN
            # No status: the client left before the answer.
            if status:
                self.metrics.requests.labels(method, route, str(status)).inc()
                if not streams:
                    self.metrics.seconds.labels(method, route).observe(seconds)
            logger.log(
                logging.DEBUG if quiet else logging.INFO, "request", extra=line | {"status": status, "seconds": seconds}
            )


class BodyLimit:
    """Refuses a body of more than ``limit`` bytes, or the limit of its path in ``exceptions``, with 413."""

    def __init__(self, app: ASGIApp, limit: int, exceptions: Mapping[str, int]) -> None:
        self.app, self.limit, self.exceptions = app, limit, exceptions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.exceptions.get(scope["path"], self.limit)
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= limit:
                return message
            # Most clients read the answer only after sending the whole body: read on, within reason.
            while message.get("more_body", False) and size < limit + 8 * self.limit:
                message = await receive()
                size += len(message.get("body", b""))
            raise HTTPException(413, f"the body is larger than the limit of {limit} bytes")

        await self.app(scope, limited, send)

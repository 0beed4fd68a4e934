"""Middleware around every route, as plain ASGI so that nothing is buffered between server and route."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ethogram.errors import Forbidden, Internal
from gateway.metrics import UNKNOWN, GatewayMetrics
from gateway.problems import problem
from gateway.settings import is_address, is_loopback
from gateway.sse import EVENT_STREAM

logger = logging.getLogger(__name__)

_SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"
# The pages of the framework load their scripts from elsewhere.
_PAGES = (
    "default-src 'self' https://cdn.jsdelivr.net https://fastapi.tiangolo.com https://fonts.googleapis.com "
    "https://fonts.gstatic.com data: blob: 'unsafe-inline'; frame-ancestors 'none'"
)
_WELL_FORMED = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestContext:
    """Counts and logs each request and gives it an id (the client's ``X-Request-ID`` if well formed); answers an
    unexpected exception with that id alone. Each answer gets headers that tell browsers what it may be used for."""

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
                policy = _PAGES if scope["path"] in ("/docs", "/redoc") else _NOTHING
                added = {"x-request-id": request_id, **_SECURITY, "content-security-policy": policy}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), text.encode()) for name, text in added.items()),
                ]
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


class OriginCheck:
    """Refuses, with 403, what a web page of another site makes a browser ask for: a change (any method but GET and
    HEAD), or anything under a name that is not the gateway's (DNS rebinding). Other programs send no such requests."""

    def __init__(self, app: ASGIApp, hosts: Collection[str], on_loopback: bool) -> None:
        """Answer to ``hosts``, to this machine's own names and, unless ``on_loopback``, to any address; if there are no
        ``hosts`` and it is not ``on_loopback``, to all."""
        self.app, self._hosts, self._on_loopback = app, frozenset(hosts), on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else ""
        if refusal:
            await problem(Forbidden(refusal), scope["state"]["request_id"])(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str:
        """Why the request is refused; empty if it is not."""
        host = headers.get("host", "")
        if host and not self._answers_to(_split_host(host)[0]):
            return (
                f"the gateway does not answer to the name {host[:200]!r}; if it is its name, put it into ETHOGRAM_HOSTS"
            )
        if method in ("GET", "HEAD"):
            return ""
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site in ("same-origin", "none") or (site is None and (origin is None or _same_host(origin, host))):
            return ""
        return (
            f"a web page of {(origin or 'another site')[:200]} asked for this, and only the gateway's own pages may; a "
            "proxy before the gateway must pass the Host header on"
        )

    def _answers_to(self, name: str) -> bool:
        if name in self._hosts or is_loopback(name):
            return True
        if self._on_loopback:
            return False
        return not self._hosts or is_address(name)


def _split_host(host: str) -> tuple[str, int | None]:
    """Name and port of a Host header; no name if it is not well-formed."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None


def _same_host(origin: str, host: str) -> bool:
    """Whether ``origin`` (RFC 6454) is that of a page from ``host``, over http or, behind a proxy, https."""
    scheme, _, rest = origin.partition("://")
    default = {"http": 80, "https": 443}.get(scheme)
    (name, port), (origin_name, origin_port) = _split_host(host), _split_host(rest)
    return default is not None and name == origin_name != "" and (port or default) == (origin_port or default)


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

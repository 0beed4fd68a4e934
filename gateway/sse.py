"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html), as bytes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Send

KEEP_ALIVE = b":\n\n"
EVENT_STREAM = "text/event-stream"
RETRY = b"retry: 1000\n\n"


def frame(event: str, data: str, id: int | None = None) -> bytes:
    """One event; ``data`` is JSON, so it holds no line break."""
    head = "" if id is None else f"id: {id}\n"
    return f"{head}event: {event}\ndata: {data}\n\n".encode()


class EventStream(StreamingResponse):
    """A response that streams an async generator, and closes it at once when the client leaves."""

    media_type = EVENT_STREAM

    def __init__(self, content: AsyncGenerator[bytes, None]) -> None:
        self._content = content
        # Proxies must neither cache nor buffer the stream.
        super().__init__(content, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._content):
            await super().stream_response(send)

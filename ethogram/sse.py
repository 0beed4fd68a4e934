"""Server-sent events, read from a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ethogram.errors import Internal


class Frame(NamedTuple):
    """One event of the stream."""

    event: str
    data: str
    id: str

    def json(self) -> Any:
        """The data; the platform's are always JSON."""
        try:
            return json.loads(self.data)
        except ValueError:
            raise Internal("the event stream carries something that is not JSON") from None


class Parser:
    """Parses bytes as they arrive; an event that a broken connection cut is dropped with the parser."""

    def __init__(self) -> None:
        self._rest = b""
        self._event, self._id = "message", ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Frame]:
        """The events that ``chunk`` completes."""
        # Not str.splitlines: it also splits at U+2028 and others, which a line of JSON may hold.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        frames = []
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", "replace")
            if not text:
                if self._data:
                    frames.append(Frame(self._event, "\n".join(self._data), self._id))
                self._event, self._data = "message", []
                continue
            name, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._event = value
            elif name == "data":
                self._data.append(value)
            elif name == "id":
                self._id = value
        return frames

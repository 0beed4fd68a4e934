"""Server-sent events, read from a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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


def frames(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """The complete events in ``chunks``; one that a broken connection cut is dropped."""
    event, id = "message", ""
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield Frame(event, "\n".join(data), id)
            event, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            id = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # Not str.splitlines: it also splits at U+2028 and others, which a line of JSON may hold.
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")

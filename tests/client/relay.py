"""A way to a real platform on which answers go astray."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
MANY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Relay:
    """What happens to the answer of each request, in their order; the rest arrive. One of: ``pass``; ``drop``: it is
    carried out and the answer lost; ``busy``, ``many``: it is refused with 503, 429; a number: cut after so many bytes.
    """

    url: str
    plan: list[str | int] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    """Heads and bodies that came."""

    def heads(self, name: bytes) -> list[bytes]:
        """The values of the header ``name`` of all requests."""
        return [value.strip() for one in self.requests for value in re.findall(rb"(?im)^%s:(.*)$" % name, one)]


@contextmanager
def relay(platform: str, *plan: str | int) -> Iterator[Relay]:
    """A relay to the platform at the URL ``platform``."""
    host, port = platform.removeprefix("http://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Relay(f"http://127.0.0.1:{listener.getsockname()[1]}", list(plan))

        def serve(near: socket.socket) -> None:
            with near:
                request = _request(near)
                if not request:
                    return
                made.requests.append(request)
                fate = made.plan.pop(0) if made.plan else "pass"
                if fate in ("busy", "many"):
                    near.sendall(BUSY if fate == "busy" else MANY)
                    return
                with socket.create_connection((host, int(port))) as far:
                    far.sendall(re.sub(rb"(?i)connection: keep-alive", b"Connection: close", request, count=1))
                    sent = 0
                    while chunk := far.recv(65536):
                        if fate == "drop":
                            continue
                        if isinstance(fate, int):
                            chunk = chunk[: fate - sent]
                        near.sendall(chunk)
                        sent += len(chunk)
                        if sent == fate:
                            return

        def accept() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(near,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield made
        listener.shutdown(socket.SHUT_RDWR)


def _request(near: socket.socket) -> bytes:
    """Its head, and the body that the head announces."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = near.recv(65536)
        if not chunk:
            return b""
        data += chunk
    head = data.partition(b"\r\n\r\n")[0]
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while len(data) < len(head) + 4 + (int(length[1]) if length else 0):
        data += near.recv(65536)
    return data

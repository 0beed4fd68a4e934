"""What the servicers of all systems share: each RPC as a single call and as a stream, and the model that answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ethogram.v1 import inference_pb2 as pb
from services.inference.dataplane import Dataplane
from services.inference.repository import Served
from services.inference.streams import in_order


class Servicer:
    """Answers by what a dataplane computes."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.dataplane = dataplane


def calls(method: Callable[..., Awaitable[Any]], dataplane: str = "dataplane", *more: str) -> tuple[Any, Any]:
    """The unary and the streaming RPC that answer each request by ``method``.

    It is called with the dataplane and the request, and between them ``more``; all but the request are attributes of
    the servicer, by name.
    """

    def bound(servicer: Any, **changes: Any) -> Callable[[Any], Awaitable[Any]]:
        plane: Dataplane = getattr(servicer, dataplane)
        return partial(method, plane._replace(**changes), *(getattr(servicer, name) for name in more))

    async def unary(servicer: Any, request: Any, context: object) -> Any:
        return await bound(servicer)(request)

    def stream(servicer: Any, request_iterator: Any, context: object) -> Any:
        # The sender of a stream is held back while the queue is full.
        return in_order(request_iterator, bound(servicer, wait_for_room=True))

    return unary, stream


def model_of(served: Served[Any]) -> pb.ModelRef:
    """The model that answered."""
    pointer = served.pointer
    return pb.ModelRef(name=pointer.name, version=pointer.version, tenant=pointer.tenant)

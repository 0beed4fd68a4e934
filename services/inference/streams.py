"""Streaming calls: several requests of one stream run at a time and are answered in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from ethogram.errors import EthogramError, Violation
from services.inference.messages import check_known

WINDOW = 4
"""Requests of one stream that run at a time: the next is read and checked while the device computes."""

Q = TypeVar("Q", bound=Message)
R = TypeVar("R")


async def in_order(requests: AsyncIterator[Q], answer: Callable[[Q], Awaitable[R]]) -> AsyncIterator[R]:
    """One answer per request, in order; an error names its request."""

    async def numbered(number: int, request: Q) -> R:
        try:
            check_known(request)
            return await answer(request)
        except EthogramError as error:
            violations = [Violation(f"requests.{number}.{v.field}", v.description) for v in error.violations]
            raise type(error)(f"request {number} of the stream: {error.message}", violations) from None

    incoming = aiter(requests)

    async def following() -> Q | None:
        return await anext(incoming, None)

    number = 0
    running: deque[asyncio.Task[R]] = deque()
    read: asyncio.Task[Q | None] | None = asyncio.create_task(following())
    try:
        while read is not None or running:
            # A client may wait for an answer before it sends more: neither side is waited for alone.
            reading = [read] if read is not None and len(running) < WINDOW else []
            await asyncio.wait([*reading, *list(running)[:1]], return_when=asyncio.FIRST_COMPLETED)
            if running and running[0].done():
                yield running.popleft().result()
            elif read is not None and read.done():
                request = read.result()
                read = None
                if request is not None:
                    running.append(asyncio.create_task(numbered(number, request)))
                    number += 1
                    read = asyncio.create_task(following())
    finally:
        left: list[asyncio.Task[Any]] = [*running, *([read] if read is not None else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

"""Streaming calls: several requests of one stream run at a time and are answered in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

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

    room, running = asyncio.Semaphore(WINDOW), asyncio.Queue[asyncio.Task[R] | None]()

    async def read() -> None:
        number = 0
        try:
            async for request in requests:
                await room.acquire()
                running.put_nowait(asyncio.create_task(numbered(number, request)))
                number += 1
        finally:
            running.put_nowait(None)

    # A client may wait for an answer before it sends more, so both sides go on by themselves.
    reading = asyncio.create_task(read())
    try:
        while (task := await running.get()) is not None:
            yield await task
            room.release()
        await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        left = [task for _ in range(running.qsize()) if (task := running.get_nowait())]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

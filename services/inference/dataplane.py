"""What the server does with a request, free of any transport and of any model: check it, batch it, compute it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple, TypeVar

from ethogram.errors import TooLarge
from services.inference.batcher import Arrays, Batcher
from services.inference.repository import ModelRepository, Reference, Served

M = TypeVar("M")
A = TypeVar("A")


class Request(NamedTuple):
    """A checked request: what a model computes on without checking it again."""

    arrays: Arrays
    """By name; the batch is the first axis of each."""
    field: str
    """The field to blame when there are too many rows."""
    options: dict[str, Hashable]
    """Keyword arguments of the model's method; requests with equal ones share a batch."""
    answer_bytes: int = 0
    """About how many bytes the answer to one row takes."""


class Dataplane(NamedTuple):
    """Runs requests on the models of a repository."""

    repository: ModelRepository
    batcher: Batcher
    threads: Executor
    """Check requests and build answers, off the event loop."""
    max_answer_bytes: int = 2**62
    wait_for_room: bool = False
    """Whether a request waits while the queue is full; otherwise it is refused."""

    async def run(
        self,
        reference: Reference,
        model_type: type[M],
        check: Callable[[M], Request],
        method: Callable[..., Arrays],
        answer: Callable[[Arrays, Served[M]], A],
        *,
        prepare: Callable[[Served[M]], Awaitable[object]] | None = None,
    ) -> A:
        """The answer to a request of the model that ``reference`` names.

        ``check`` reads and checks the request for the model, once. ``method`` computes, called as ``method(model,
        arrays, **options)`` on the device's thread. ``answer`` makes a message of its result. ``prepare`` is
        awaited before it computes, e.g. to load what only some calls need.

        Raises :class:`InvalidInput` with the field that is wrong, :class:`NotFound` for an unknown model, and
        :class:`TooLarge` for a full queue or an answer of more than ``max_answer_bytes``.
        """
        loop = asyncio.get_running_loop()
        served = await self.repository.get(reference, model_type)
        request = await loop.run_in_executor(self.threads, check, served.model)
        size = len(next(iter(request.arrays.values()))) * request.answer_bytes
        if size > self.max_answer_bytes:
            text = f"the answer would take {size} bytes, at most {self.max_answer_bytes}; send fewer, or a stream"
            raise TooLarge.field(request.field, text)
        if prepare is not None:
            await prepare(served)
        key = (served.pointer.artifact, method.__name__, *request.options.values())
        function = partial(method, served.model, **request.options)
        arrays = await self.batcher.run(
            key, function, request.arrays, name=request.field, wait_for_room=self.wait_for_room
        )
        return await loop.run_in_executor(self.threads, answer, arrays, served)

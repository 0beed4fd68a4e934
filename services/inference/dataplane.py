"""What the server does with a request, free of any transport and of any model: check it, batch it, compute it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from functools import partial
from typing import NamedTuple, TypeVar

from ethogram.errors import TooLarge, Violation
from services.inference.batcher import Arrays, Batcher
from services.inference.repository import ModelRepository, Reference, Served

M = TypeVar("M")


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


class Dataplane:
    """Runs requests on the repository's models.

    Raises :class:`InvalidInput` with the field that is wrong, :class:`NotFound` for an unknown model, and
    :class:`TooLarge` for a full queue (unless ``patient``) or an answer of more than ``max_answer_bytes``.
    """

    def __init__(
        self,
        repository: ModelRepository,
        batcher: Batcher,
        checks: Executor,
        *,
        max_answer_bytes: int = 2**62,
        patient: bool = False,
    ) -> None:
        self.repository, self._batcher, self._checks = repository, batcher, checks
        self._max_answer_bytes, self._patient = max_answer_bytes, patient

    async def run(
        self, reference: Reference, model_type: type[M], check: Callable[[M], Request], method: Callable[..., Arrays]
    ) -> tuple[Arrays, Served[M]]:
        """What ``method`` of the model that ``reference`` names computes from a request, and the model.

        ``check`` reads and checks the request for the model; it runs once, on a checking thread and so off the event
        loop. ``method`` is called as ``method(model, arrays, **options)`` on the device's thread.
        """
        served = await self.repository.get(reference, model_type)
        request = await asyncio.get_running_loop().run_in_executor(self._checks, check, served.model)
        size = len(next(iter(request.arrays.values()))) * request.answer_bytes
        if size > self._max_answer_bytes:
            description = (
                f"the answer would take {size} bytes, at most {self._max_answer_bytes}; send fewer, or a stream"
            )
            raise TooLarge(f"{request.field}: {description}", [Violation(request.field, description)])
        key = (served.pointer.artifact, method.__name__, *request.options.values())
        function = partial(method, served.model, **request.options)
        arrays = await self._batcher.run(key, function, request.arrays, name=request.field, patient=self._patient)
        return arrays, served

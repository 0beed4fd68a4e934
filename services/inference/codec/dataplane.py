"""What the server does with codecs, free of any transport: NumPy arrays in, checked, batched, computed, arrays out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ethogram.errors import TooLarge, Violation
from ethogram.specs.edits import Steering
from services.inference.batcher import Arrays, Batcher
from services.inference.codec.served import Request, ServedCodec
from services.inference.repository import ModelRepository, Reference, Served

Codec = Served[ServedCodec]
ReadNetworks = Callable[[], Arrays]
"""Reads the parameters of a request, by name; called on a checking thread."""


class Answer(NamedTuple):
    """What a model computed, by name, and the model."""

    arrays: Arrays
    served: Codec


class Dataplane:
    """The calls on codecs.

    Each reads and checks its request once, on ``checks`` and so off the event loop. Each raises :class:`InvalidInput`
    with the field that is wrong, :class:`NotFound` for an unknown model, and :class:`TooLarge` for a full queue (unless
    ``patient``) or an answer of more than ``max_answer_bytes``.
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
        self._repository, self._batcher, self._checks = repository, batcher, checks
        self._max_answer_bytes, self._patient = max_answer_bytes, patient

    async def model(self, model: Reference) -> Codec:
        """The model that ``model`` names."""
        return await self._repository.get(model, ServedCodec)

    async def encode(self, model: Reference, read: ReadNetworks, activation: str | None = None) -> Answer:
        """``latents`` ``[batch, latent]`` of networks; their signatures are taken on the model's own probes."""
        served = await self.model(model)
        request = await self._checked(lambda: served.model.check_networks(read(), activation))
        return await self._run(served, served.model.encode, request)

    async def encode_signatures(self, model: Reference, read: Callable[[], NDArray[Any]]) -> Answer:
        """``latents`` of signatures ``[batch, neurons, values]`` that were taken on the model's probes."""
        served = await self.model(model)
        request = await self._checked(lambda: served.model.check_signatures(read()))
        return await self._run(served, served.model.encode_signatures, request, field="signatures")

    async def decode(
        self,
        model: Reference,
        read: Callable[[], NDArray[Any]],
        hidden: Sequence[int] = (),
        activation: str | None = None,
    ) -> Answer:
        """Parameters of the networks of latents ``[batch, latent]``; ``hidden``: widths of their hidden layers, where
        the model knows several."""
        served = await self.model(model)
        request = await self._checked(lambda: served.model.check_latents(read(), hidden, activation))
        row_bytes = served.model.network_bytes
        return await self._run(served, served.model.decode, request, field="latents", row_bytes=row_bytes)

    async def steer(
        self, model: Reference, read: ReadNetworks, steering: Steering, activation: str | None = None
    ) -> Answer:
        """Parameters of the steered networks, and their ``latents``."""
        served = await self.model(model)
        return await self._steer(served, served.model.steer, read, steering, activation)

    async def effect(
        self, model: Reference, read: ReadNetworks, steering: Steering, activation: str | None = None
    ) -> Answer:
        """The same, with what the edits do, predicted from the latents and measured on held-out sequences: the fields
        of :class:`services.crossmodal.codec.Effect` by name."""
        served = await self.model(model)
        return await self._steer(served, served.model.effect, read, steering, activation)

    async def evaluate(self, model: Reference, read: ReadNetworks, activation: str | None = None) -> Answer:
        """How networks behave on labelled sequences that no network was trained on: ``recall`` ``[batch, behaviours]``
        and ``false_positive_rate`` ``[batch]``."""
        served = await self.model(model)
        request = await self._checked(lambda: served.model.check_networks(read(), activation))
        return await self._run(served, served.model.evaluate, request)

    async def _steer(
        self,
        served: Codec,
        method: Callable[..., Arrays],
        read: ReadNetworks,
        steering: Steering,
        activation: str | None,
    ) -> Answer:
        request = await self._checked(lambda: served.model.check_networks(read(), activation, steering))
        row_bytes = served.model.network_bytes + served.model.latent_bytes
        return await self._run(served, method, request, row_bytes=row_bytes, steering=steering)

    async def _checked(self, check: Callable[[], Request]) -> Request:
        return await asyncio.get_running_loop().run_in_executor(self._checks, check)

    async def _run(
        self,
        served: Codec,
        method: Callable[..., Arrays],
        request: Request,
        *,
        field: str = "networks",
        row_bytes: int = 0,
        **options: Steering,
    ) -> Answer:
        """What ``method`` answers; ``row_bytes``: bytes of its answer to one row."""
        size = len(next(iter(request.arrays.values()))) * row_bytes
        if size > self._max_answer_bytes:
            description = (
                f"the answer would take {size} bytes, at most {self._max_answer_bytes}; send fewer, or a stream"
            )
            raise TooLarge(f"{field}: {description}", [Violation(field, description)])
        key = (served.pointer.artifact, method.__name__, request.shape, *options.values())
        function = partial(method, shape=request.shape, **options)
        result = await self._batcher.run(key, function, request.arrays, name=field, patient=self._patient)
        return Answer(result, served)

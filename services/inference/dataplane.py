"""What the server does, free of any transport: NumPy arrays in, checked, batched, computed, NumPy arrays out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ethogram.errors import InvalidInput, TooLarge, Violation
from services.artifacts.store import ModelPointer
from services.crossmodal import checks
from services.crossmodal.codec import Behavior
from services.inference.batcher import Arrays, Batcher
from services.inference.codec import LATENTS, Change, ServedCodec
from services.inference.repository import ModelRepository, Reference, Served
from services.zoo.subjects import Architecture

EFFECT = (LATENTS, "strength", "had", "predicted", "recall", "false_positive_rate", "target", "local")
TOO_LARGE = "values so large that the result is not finite"


class Encoded(NamedTuple):
    """``latents`` ``[batch, latent]``."""

    latents: NDArray[np.float32]
    model: ModelPointer


class Decoded(NamedTuple):
    """``networks``: parameters ``[batch, ...]`` by name."""

    networks: Arrays
    model: ModelPointer


class Steered(NamedTuple):
    """Steered ``networks`` and their ``latents`` ``[batch, latent]`` after the edit."""

    networks: Arrays
    latents: NDArray[np.float32]
    model: ModelPointer


class Wanted(NamedTuple):
    """A change as a request asks for it, not checked yet."""

    edits: Sequence[tuple[str, ...]]
    mode: str = "residual"
    strength: float | str = 1.0
    direction: str = "learned"


class Affected(NamedTuple):
    """Steered ``networks``, and ``found``: an array for each of :data:`EFFECT`."""

    networks: Arrays
    found: Arrays


class Evaluated(NamedTuple):
    """``recall`` ``[batch, behaviours]`` and ``false_positive_rate`` ``[batch]``."""

    behaviors: list[str]
    recall: NDArray[np.float32]
    false_positive_rate: NDArray[np.float32]
    model: ModelPointer


class Known(NamedTuple):
    """The behaviours of a model."""

    behaviors: Sequence[Behavior]
    model: ModelPointer


class Dataplane:
    """The calls. Each raises :class:`InvalidInput` with the field that is wrong, :class:`NotFound` for an unknown
    model, and :class:`TooLarge` for a full queue (unless ``patient``) or an answer of more than ``max_answer_bytes``.
    """

    def __init__(
        self,
        repository: ModelRepository[ServedCodec],
        batcher: Batcher,
        *,
        max_answer_bytes: int = 2**62,
        patient: bool = False,
    ) -> None:
        self._repository, self._batcher = repository, batcher
        self._max_answer_bytes, self._patient = max_answer_bytes, patient

    async def encode(self, model: Reference, networks: Arrays, activation: str | None = None) -> Encoded:
        """Latents of networks; their signatures are taken on the model's own probes."""
        served = await self._repository.get(model)
        arrays, shape = served.model.check_networks(networks, activation)
        function = partial(served.model.encode, shape=shape)
        result = await self._run(served, ("encode", shape), function, arrays, "networks")
        return Encoded(result[LATENTS], served.pointer)

    async def encode_signatures(self, model: Reference, signatures: NDArray[Any]) -> Encoded:
        """Latents of signatures ``[batch, neurons, values]`` that were taken on the model's probes."""
        served = await self._repository.get(model)
        arrays: Arrays = {"signatures": served.model.check_rows(signatures, served.model.signature_shape, "signatures")}
        function = served.model.encode_signatures
        result = await self._run(served, "encode_signatures", function, arrays, "signatures")
        return Encoded(result[LATENTS], served.pointer)

    async def decode(
        self, model: Reference, latents: NDArray[Any], hidden: Sequence[int] = (), activation: str | None = None
    ) -> Decoded:
        """Networks of latents ``[batch, latent]``; ``hidden``: widths of their hidden layers, where the model knows
        several."""
        served = await self._repository.get(model)
        shape = served.model.check_shape(hidden, activation)
        arrays: Arrays = {LATENTS: served.model.check_rows(latents, (served.model.latent_size,), "latents")}
        self._check_answer(len(latents) * served.model.network_bytes, "latents")
        function = partial(served.model.decode, shape=shape)
        result = await self._run(served, ("decode", shape), function, arrays, "latents")
        return Decoded(result, served.pointer)

    async def steer(self, model: Reference, networks: Arrays, change: Wanted, activation: str | None = None) -> Steered:
        """Networks that gain or lose behaviours."""
        served, arrays, shape, checked = await self._change(model, networks, change, activation)
        function = partial(served.model.steer, shape=shape, change=checked)
        result = await self._run(served, ("steer", shape, checked), function, arrays, "networks")
        latents = result.pop(LATENTS)
        return Steered(result, latents, served.pointer)

    async def effect(
        self, model: Reference, networks: Arrays, change: Wanted, activation: str | None = None
    ) -> Affected:
        """The same, with what the edits do, predicted from the latents and measured on held-out sequences."""
        served, arrays, shape, checked = await self._change(model, networks, change, activation)
        function = partial(served.model.effect, shape=shape, change=checked)
        result = await self._run(served, ("effect", shape, checked), function, arrays, None)
        found = {name: result.pop(name) for name in EFFECT}
        if not all(np.isfinite(array).all() for array in (*result.values(), found[LATENTS])):
            raise InvalidInput.field("networks", TOO_LARGE)
        return Affected(result, found)

    async def evaluate(self, model: Reference, networks: Arrays, activation: str | None = None) -> Evaluated:
        """How networks behave on labelled sequences that no network was trained on."""
        served = await self._repository.get(model)
        arrays, shape = served.model.check_networks(networks, activation)
        function = partial(served.model.evaluate, shape=shape)
        result = await self._run(served, ("evaluate", shape), function, arrays, None)
        names = [behavior.name for behavior in served.model.behaviors]
        return Evaluated(names, result["recall"], result["false_positive_rate"], served.pointer)

    async def _change(
        self, model: Reference, networks: Arrays, change: Wanted, activation: str | None
    ) -> tuple[Served[ServedCodec], Arrays, Architecture, Change]:
        """The model, and everything checked."""
        mode, strength, direction = (
            checks.mode(change.mode),
            checks.strength(change.strength),
            checks.direction(change.direction),
        )
        served = await self._repository.get(model)
        names = [behavior.name for behavior in served.model.behaviors]
        checked = Change(checks.edits(change.edits, names), mode, strength, direction)
        arrays, shape = served.model.check_networks(networks, activation)
        count = len(next(iter(arrays.values())))
        self._check_answer(count * (served.model.network_bytes + 4 * served.model.latent_size), "networks")
        return served, arrays, shape, checked

    async def behaviors(self, model: Reference) -> Known:
        """The behaviours that a model can steer."""
        served = await self._repository.get(model)
        return Known(served.model.behaviors, served.pointer)

    async def _run(
        self,
        served: Served[ServedCodec],
        call: Hashable,
        function: Callable[[Arrays], Arrays],
        arrays: Arrays,
        finite: str | None,
    ) -> Arrays:
        key = (served.pointer.artifact, call)
        result = await self._batcher.run(key, function, arrays, name=finite or "networks", patient=self._patient)
        # Weights of 1e38 are valid numbers, and what comes of them is not.
        if finite and not all(np.isfinite(array).all() for array in result.values()):
            raise InvalidInput.field(finite, TOO_LARGE)
        return dict(result)

    def _check_answer(self, size: int, field: str) -> None:
        if size > self._max_answer_bytes:
            description = (
                f"the answer would take {size} bytes, at most {self._max_answer_bytes}; send fewer, or a stream"
            )
            raise TooLarge(f"{field}: {description}", [Violation(field, description)])

"""The gRPC services: messages to arrays and back, nothing else."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from ethogram.errors import EthogramError, InvalidInput, Violation
from ethogram.tensors import from_tensor, to_tensor
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1 import inference_pb2_grpc
from services.artifacts.store import ModelPointer
from services.inference.batcher import Arrays
from services.inference.dataplane import Dataplane, Wanted
from services.inference.interceptor import check_known
from services.inference.repository import Reference

# Requests of one stream that are under way: the next is read and checked while the device computes.
WINDOW = 4

Q = TypeVar("Q", bound=Message)
R = TypeVar("R")

_OPERATIONS = {
    pb.EDIT_OPERATION_ADD: "add",
    pb.EDIT_OPERATION_REMOVE: "remove",
    pb.EDIT_OPERATION_REPLACE: "replace",
}
_DIRECTIONS = {
    pb.DIRECTION_UNSPECIFIED: "learned",
    pb.DIRECTION_LEARNED: "learned",
    pb.DIRECTION_MEAN_DIFFERENCE: "mean_difference",
    pb.DIRECTION_CLASSIFIER_NORMAL: "classifier_normal",
}
_MODES = {pb.EDIT_MODE_UNSPECIFIED: "residual", pb.EDIT_MODE_RESIDUAL: "residual", pb.EDIT_MODE_DIRECT: "direct"}


class CodecServicer(inference_pb2_grpc.CodecServiceServicer):
    """Encode and Decode."""

    def __init__(self, dataplane: Dataplane, patient: Dataplane) -> None:
        """``patient`` is for streams: it waits where ``dataplane`` refuses."""
        self._dataplane, self._patient = dataplane, patient

    async def Encode(self, request: pb.EncodeRequest, context: object) -> pb.EncodeResponse:
        return await _encode(self._dataplane, request)

    async def Decode(self, request: pb.DecodeRequest, context: object) -> pb.DecodeResponse:
        return await _decode(self._dataplane, request)

    def EncodeStream(
        self, request_iterator: AsyncIterator[pb.EncodeRequest], context: object
    ) -> AsyncIterator[pb.EncodeResponse]:
        return _in_order(request_iterator, partial(_encode, self._patient))

    def DecodeStream(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: object
    ) -> AsyncIterator[pb.DecodeResponse]:
        return _in_order(request_iterator, partial(_decode, self._patient))


class SteeringServicer(inference_pb2_grpc.SteeringServiceServicer):
    """ListBehaviors, Steer and Evaluate."""

    def __init__(self, dataplane: Dataplane, patient: Dataplane) -> None:
        """``patient`` is for streams: it waits where ``dataplane`` refuses."""
        self._dataplane, self._patient = dataplane, patient

    async def ListBehaviors(self, request: pb.ListBehaviorsRequest, context: object) -> pb.ListBehaviorsResponse:
        result = await self._dataplane.behaviors(_reference(request.model))
        behaviors = [pb.Behavior(**behavior._asdict()) for behavior in result.behaviors]
        return pb.ListBehaviorsResponse(behaviors=behaviors, model=_answered(result.model))

    async def Steer(self, request: pb.SteerRequest, context: object) -> pb.SteerResponse:
        return await _steer(self._dataplane, request)

    async def Evaluate(self, request: pb.EvaluateRequest, context: object) -> pb.EvaluateResponse:
        return await _evaluate(self._dataplane, request)

    def SteerStream(
        self, request_iterator: AsyncIterator[pb.SteerRequest], context: object
    ) -> AsyncIterator[pb.SteerResponse]:
        return _in_order(request_iterator, partial(_steer, self._patient))

    def EvaluateStream(
        self, request_iterator: AsyncIterator[pb.EvaluateRequest], context: object
    ) -> AsyncIterator[pb.EvaluateResponse]:
        return _in_order(request_iterator, partial(_evaluate, self._patient))


async def _encode(dataplane: Dataplane, request: pb.EncodeRequest) -> pb.EncodeResponse:
    model = _reference(request.model)
    match request.WhichOneof("input"):
        case "networks":
            result = await dataplane.encode(model, *_networks(request.networks))
        case "signatures":
            result = await dataplane.encode_signatures(model, from_tensor(request.signatures, "signatures"))
        case _:
            raise InvalidInput.field("input", "missing; set networks or signatures")
    return pb.EncodeResponse(latents=to_tensor(result.latents), model=_answered(result.model))


async def _decode(dataplane: Dataplane, request: pb.DecodeRequest) -> pb.DecodeResponse:
    model = _reference(request.model)
    latents, shape = from_tensor(_set(request, "latents"), "latents"), request.architecture
    result = await dataplane.decode(model, latents, tuple(shape.hidden), shape.activation or None)
    return pb.DecodeResponse(networks=_to_networks(result.networks), model=_answered(result.model))


async def _steer(dataplane: Dataplane, request: pb.SteerRequest) -> pb.SteerResponse:
    networks, activation = _networks(_set(request, "networks"))
    result = await dataplane.steer(_reference(request.model), networks, _wanted(request), activation)
    return pb.SteerResponse(
        networks=_to_networks(result.networks), latents=to_tensor(result.latents), model=_answered(result.model)
    )


async def _evaluate(dataplane: Dataplane, request: pb.EvaluateRequest) -> pb.EvaluateResponse:
    networks, activation = _networks(_set(request, "networks"))
    model, effect = _reference(request.model), None
    if request.edits:
        affected = await dataplane.effect(model, networks, _wanted(request), activation)
        found = {name: to_tensor(array) for name, array in affected.found.items()}
        effect = pb.Effect(networks=_to_networks(affected.networks), **found)
    result = await dataplane.evaluate(model, networks, activation)
    return pb.EvaluateResponse(
        behaviors=result.behaviors,
        recall=to_tensor(result.recall),
        false_positive_rate=to_tensor(result.false_positive_rate),
        model=_answered(result.model),
        effect=effect,
    )


def _wanted(request: pb.SteerRequest | pb.EvaluateRequest) -> Wanted:
    if request.auto_strength and request.HasField("strength"):
        raise InvalidInput.field("strength", "is chosen for each network with auto_strength; leave one of them out")
    strength = request.strength if request.HasField("strength") else 1.0
    return Wanted(
        [
            (_OPERATIONS.get(edit.operation, ""), edit.behavior, *([edit.by] if edit.by else []))
            for edit in request.edits
        ],
        _MODES.get(request.mode, ""),
        "auto" if request.auto_strength else strength,
        _DIRECTIONS.get(request.direction, ""),
    )


async def _in_order(requests: AsyncIterator[Q], answer: Callable[[Q], Awaitable[R]]) -> AsyncIterator[R]:
    """One answer per request, in order; an error names the request that it belongs to."""

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
    under_way: deque[asyncio.Task[R]] = deque()
    read: asyncio.Task[Q | None] | None = asyncio.create_task(following())
    try:
        while read is not None or under_way:
            # A client may wait for an answer before it sends more: neither side is waited for alone.
            reading = [read] if read is not None and len(under_way) < WINDOW else []
            await asyncio.wait([*reading, *list(under_way)[:1]], return_when=asyncio.FIRST_COMPLETED)
            if under_way and under_way[0].done():
                yield under_way.popleft().result()
            elif read is not None and read.done():
                request = read.result()
                read = None
                if request is not None:
                    under_way.append(asyncio.create_task(numbered(number, request)))
                    number += 1
                    read = asyncio.create_task(following())
    finally:
        left: list[asyncio.Task[Any]] = [*under_way, *([read] if read is not None else [])]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _reference(model: pb.ModelRef) -> Reference:
    if not model.name:
        raise InvalidInput.field("model.name", "missing; name a published model")
    return Reference(model.tenant or "default", model.name, model.version or None)


def _answered(pointer: ModelPointer) -> pb.ModelRef:
    return pb.ModelRef(name=pointer.name, version=pointer.version, tenant=pointer.tenant)


def _set(request: Message, field: str) -> Any:
    if not request.HasField(field):
        raise InvalidInput.field(field, "missing")
    return getattr(request, field)


def _networks(message: pb.Networks) -> tuple[Arrays, str | None]:
    """Parameters, and the activation where one is named."""
    parameters = message.parameters.items()
    arrays = {name: from_tensor(tensor, f"networks.parameters.{name}") for name, tensor in parameters}
    return arrays, message.activation or None


def _to_networks(networks: Arrays) -> pb.Networks:
    return pb.Networks(parameters={name: to_tensor(array) for name, array in networks.items()})

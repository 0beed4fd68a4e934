"""The gRPC services of codecs: messages to arrays and back, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.tensors import from_tensor, to_tensor
from ethogram.v1 import common_pb2, inference_pb2_grpc
from ethogram.v1 import inference_pb2 as pb
from ethogram.wire import steering_of
from services.inference.batcher import Arrays
from services.inference.codec.dataplane import Codec, Dataplane
from services.inference.codec.served import LATENTS
from services.inference.messages import reference, required
from services.inference.streams import in_order

EFFECT = (LATENTS, "strength", "had", "predicted", "recall", "false_positive_rate", "target", "local")


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
        return in_order(request_iterator, partial(_encode, self._patient))

    def DecodeStream(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: object
    ) -> AsyncIterator[pb.DecodeResponse]:
        return in_order(request_iterator, partial(_decode, self._patient))


class SteeringServicer(inference_pb2_grpc.SteeringServiceServicer):
    """ListBehaviors, Steer and Evaluate."""

    def __init__(self, dataplane: Dataplane, patient: Dataplane) -> None:
        """``patient`` is for streams: it waits where ``dataplane`` refuses."""
        self._dataplane, self._patient = dataplane, patient

    async def ListBehaviors(self, request: pb.ListBehaviorsRequest, context: object) -> pb.ListBehaviorsResponse:
        served = await self._dataplane.model(reference(request.model))
        behaviors = [pb.Behavior(**behavior._asdict()) for behavior in served.model.behaviors]
        return pb.ListBehaviorsResponse(behaviors=behaviors, model=_model(served))

    async def Steer(self, request: pb.SteerRequest, context: object) -> pb.SteerResponse:
        return await _steer(self._dataplane, request)

    async def Evaluate(self, request: pb.EvaluateRequest, context: object) -> pb.EvaluateResponse:
        return await _evaluate(self._dataplane, request)

    def SteerStream(
        self, request_iterator: AsyncIterator[pb.SteerRequest], context: object
    ) -> AsyncIterator[pb.SteerResponse]:
        return in_order(request_iterator, partial(_steer, self._patient))

    def EvaluateStream(
        self, request_iterator: AsyncIterator[pb.EvaluateRequest], context: object
    ) -> AsyncIterator[pb.EvaluateResponse]:
        return in_order(request_iterator, partial(_evaluate, self._patient))


async def _encode(dataplane: Dataplane, request: pb.EncodeRequest) -> pb.EncodeResponse:
    model = reference(request.model)
    match request.WhichOneof("input"):
        case "networks":
            networks = request.networks
            answer = await dataplane.encode(model, partial(_read, networks), networks.activation or None)
        case "signatures":
            answer = await dataplane.encode_signatures(model, partial(_array, request.signatures, "signatures"))
        case _:
            raise InvalidInput.field("input", "missing; set networks or signatures")
    return pb.EncodeResponse(latents=to_tensor(answer.arrays[LATENTS]), model=_model(answer.served))


async def _decode(dataplane: Dataplane, request: pb.DecodeRequest) -> pb.DecodeResponse:
    read, shape = partial(_array, required(request, "latents"), "latents"), request.architecture
    answer = await dataplane.decode(reference(request.model), read, tuple(shape.hidden), shape.activation or None)
    return pb.DecodeResponse(networks=_networks(answer.arrays), model=_model(answer.served))


async def _steer(dataplane: Dataplane, request: pb.SteerRequest) -> pb.SteerResponse:
    networks: pb.Networks = required(request, "networks")
    answer = await dataplane.steer(
        reference(request.model), partial(_read, networks), steering_of(request), networks.activation or None
    )
    latents = to_tensor(answer.arrays.pop(LATENTS))
    return pb.SteerResponse(networks=_networks(answer.arrays), latents=latents, model=_model(answer.served))


async def _evaluate(dataplane: Dataplane, request: pb.EvaluateRequest) -> pb.EvaluateResponse:
    networks: pb.Networks = required(request, "networks")
    model, read, activation = reference(request.model), partial(_read, networks), networks.activation or None
    effect = None
    if request.edits:
        answer = await dataplane.effect(model, read, steering_of(request), activation)
        arrays = {name: answer.arrays.pop(name) for name in EFFECT}
        effect = pb.Effect(
            networks=_networks(answer.arrays), **{name: to_tensor(array) for name, array in arrays.items()}
        )
        # What was measured before the edit is what there is without one.
        recall, rate = arrays["recall"][:, 0], arrays["false_positive_rate"][:, 0]
    else:
        answer = await dataplane.evaluate(model, read, activation)
        recall, rate = answer.arrays["recall"], answer.arrays["false_positive_rate"]
    return pb.EvaluateResponse(
        behaviors=[behavior.name for behavior in answer.served.model.behaviors],
        recall=to_tensor(recall),
        false_positive_rate=to_tensor(rate),
        model=_model(answer.served),
        effect=effect,
    )


def _model(served: Codec) -> pb.ModelRef:
    pointer = served.pointer
    return pb.ModelRef(name=pointer.name, version=pointer.version, tenant=pointer.tenant)


def _array(tensor: common_pb2.Tensor, field: str) -> NDArray[Any]:
    # Whether the numbers are finite is checked with the rest.
    return from_tensor(tensor, field, finite=False)


def _read(networks: pb.Networks) -> Arrays:
    return {name: _array(tensor, f"networks.parameters.{name}") for name, tensor in networks.parameters.items()}


def _networks(parameters: Arrays) -> pb.Networks:
    return pb.Networks(parameters={name: to_tensor(array) for name, array in parameters.items()})

"""The gRPC services of codecs: messages to arrays and back, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.tensors import from_tensor, to_tensor
from ethogram.v1 import common_pb2, inference_pb2_grpc
from ethogram.v1 import inference_pb2 as pb
from ethogram.wire import steering_of
from services.inference.batcher import Arrays
from services.inference.codec.served import LATENTS, ServedCodec
from services.inference.dataplane import Dataplane
from services.inference.messages import reference, required
from services.inference.repository import Served
from services.inference.streams import in_order

EFFECT = (LATENTS, "strength", "had", "predicted", "recall", "false_positive_rate", "target", "local")


class _Servicer:
    def __init__(self, dataplane: Dataplane, patient: Dataplane) -> None:
        """``patient`` is for streams: it waits where ``dataplane`` refuses."""
        self._dataplane, self._patient = dataplane, patient


class CodecServicer(_Servicer, inference_pb2_grpc.CodecServiceServicer):
    """Encode and Decode."""

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


class SteeringServicer(_Servicer, inference_pb2_grpc.SteeringServiceServicer):
    """ListBehaviors, Steer and Evaluate."""

    async def ListBehaviors(self, request: pb.ListBehaviorsRequest, context: object) -> pb.ListBehaviorsResponse:
        served = await self._dataplane.repository.get(reference(request.model), ServedCodec)
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
    model, networks = reference(request.model), request.networks
    match request.WhichOneof("input"):
        case "networks":
            arrays, served = await dataplane.run(
                model, ServedCodec, lambda codec: codec.check_networks(*_read(networks)), ServedCodec.encode
            )
        case "signatures":
            arrays, served = await dataplane.run(
                model,
                ServedCodec,
                lambda codec: codec.check_signatures(_array(request.signatures, "signatures")),
                ServedCodec.encode_signatures,
            )
        case _:
            raise InvalidInput.field("input", "missing; set networks or signatures")
    return pb.EncodeResponse(latents=to_tensor(arrays[LATENTS]), model=_model(served))


async def _decode(dataplane: Dataplane, request: pb.DecodeRequest) -> pb.DecodeResponse:
    latents, shape = required(request, "latents"), request.architecture
    arrays, served = await dataplane.run(
        reference(request.model),
        ServedCodec,
        lambda codec: codec.check_latents(_array(latents, "latents"), tuple(shape.hidden), shape.activation or None),
        ServedCodec.decode,
    )
    return pb.DecodeResponse(networks=_networks(arrays), model=_model(served))


async def _steer(dataplane: Dataplane, request: pb.SteerRequest) -> pb.SteerResponse:
    arrays, served = await _on_networks(dataplane, request, ServedCodec.steer, steers=True)
    latents = to_tensor(arrays.pop(LATENTS))
    return pb.SteerResponse(networks=_networks(arrays), latents=latents, model=_model(served))


async def _evaluate(dataplane: Dataplane, request: pb.EvaluateRequest) -> pb.EvaluateResponse:
    effect = None
    if request.edits:
        arrays, served = await _on_networks(dataplane, request, ServedCodec.effect, steers=True)
        fields = {name: arrays.pop(name) for name in EFFECT}
        effect = pb.Effect(networks=_networks(arrays), **{name: to_tensor(array) for name, array in fields.items()})
        # What was measured before the edit is what there is without one.
        recall, rate = fields["recall"][:, 0], fields["false_positive_rate"][:, 0]
    else:
        arrays, served = await _on_networks(dataplane, request, ServedCodec.evaluate, steers=False)
        recall, rate = arrays["recall"], arrays["false_positive_rate"]
    return pb.EvaluateResponse(
        behaviors=[behavior.name for behavior in served.model.behaviors],
        recall=to_tensor(recall),
        false_positive_rate=to_tensor(rate),
        model=_model(served),
        effect=effect,
    )


async def _on_networks(
    dataplane: Dataplane,
    request: pb.SteerRequest | pb.EvaluateRequest,
    method: Callable[..., Arrays],
    *,
    steers: bool,
) -> tuple[Arrays, Served[ServedCodec]]:
    networks: pb.Networks = required(request, "networks")
    steering = steering_of(request) if steers else None
    return await dataplane.run(
        reference(request.model), ServedCodec, lambda codec: codec.check_networks(*_read(networks), steering), method
    )


def _model(served: Served[ServedCodec]) -> pb.ModelRef:
    pointer = served.pointer
    return pb.ModelRef(name=pointer.name, version=pointer.version, tenant=pointer.tenant)


def _array(tensor: common_pb2.Tensor, field: str) -> NDArray[Any]:
    # Whether the numbers are finite is checked with the rest.
    return from_tensor(tensor, field, finite=False)


def _read(networks: pb.Networks) -> tuple[Arrays, str | None]:
    """Parameters by name, and the activation where one is named."""
    parameters = networks.parameters.items()
    arrays = {name: _array(tensor, f"networks.parameters.{name}") for name, tensor in parameters}
    return arrays, networks.activation or None


def _networks(parameters: Arrays) -> pb.Networks:
    return pb.Networks(parameters={name: to_tensor(array) for name, array in parameters.items()})

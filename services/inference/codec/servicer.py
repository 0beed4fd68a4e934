"""The gRPC services of codecs: messages to arrays and back, nothing else."""

from __future__ import annotations

from collections.abc import Callable

from ethogram.errors import InvalidInput
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1 import inference_pb2_grpc
from ethogram.wire import from_tensor, steering_of, to_tensor
from services.inference.batcher import Arrays
from services.inference.codec.served import LATENTS, ServedCodec
from services.inference.dataplane import Dataplane, Request
from services.inference.messages import reference, required
from services.inference.repository import Served
from services.inference.servicer import Servicer, calls, model_of

EFFECT = (LATENTS, "strength", "had", "predicted", "recall", "false_positive_rate", "target", "local", "kept")


async def _list_behaviors(dataplane: Dataplane, request: pb.ListBehaviorsRequest) -> pb.ListBehaviorsResponse:
    served = await dataplane.repository.get(reference(request.model), ServedCodec)
    behaviors = [pb.Behavior(**behavior._asdict()) for behavior in served.model.behaviors]
    return pb.ListBehaviorsResponse(behaviors=behaviors, model=model_of(served))


async def _encode(dataplane: Dataplane, request: pb.EncodeRequest) -> pb.EncodeResponse:
    model = reference(request.model)
    method: Callable[..., Arrays]
    match request.WhichOneof("input"):
        case "networks":
            method = ServedCodec.encode

            def check(codec: ServedCodec) -> Request:
                return codec.check_networks(*_read(request.networks))
        case "signatures":
            method = ServedCodec.encode_signatures

            def check(codec: ServedCodec) -> Request:
                return codec.check_signatures(from_tensor(request.signatures, "signatures"))
        case _:
            raise InvalidInput.field("input", "missing; set networks or signatures")

    def answer(arrays: Arrays, served: Served[ServedCodec]) -> pb.EncodeResponse:
        return pb.EncodeResponse(latents=to_tensor(arrays[LATENTS]), model=model_of(served))

    return await dataplane.run(model, ServedCodec, check, method, answer)


async def _decode(dataplane: Dataplane, request: pb.DecodeRequest) -> pb.DecodeResponse:
    latents, shape = required(request, "latents"), request.architecture

    def check(codec: ServedCodec) -> Request:
        return codec.check_latents(from_tensor(latents, "latents"), tuple(shape.hidden), shape.activation or None)

    def answer(arrays: Arrays, served: Served[ServedCodec]) -> pb.DecodeResponse:
        return pb.DecodeResponse(networks=_networks(arrays), model=model_of(served))

    return await dataplane.run(reference(request.model), ServedCodec, check, ServedCodec.decode, answer)


async def _steer(dataplane: Dataplane, request: pb.SteerRequest) -> pb.SteerResponse:
    def answer(arrays: Arrays, served: Served[ServedCodec]) -> pb.SteerResponse:
        latents = to_tensor(arrays.pop(LATENTS))
        return pb.SteerResponse(networks=_networks(arrays), latents=latents, model=model_of(served))

    model, check = reference(request.model), _network_check(request, steers=True)
    return await dataplane.run(model, ServedCodec, check, ServedCodec.steer, answer)


async def _evaluate(dataplane: Dataplane, request: pb.EvaluateRequest) -> pb.EvaluateResponse:
    steers = bool(request.edits)

    def answer(arrays: Arrays, served: Served[ServedCodec]) -> pb.EvaluateResponse:
        effect, recall, rate = None, arrays["recall"], arrays["false_positive_rate"]
        if steers:
            fields = {name: to_tensor(arrays.pop(name)) for name in EFFECT}
            effect = pb.Effect(networks=_networks(arrays), **fields)
            # What was measured before the edit is what there is without one.
            recall, rate = recall[:, 0], rate[:, 0]
        return pb.EvaluateResponse(
            behaviors=[behavior.name for behavior in served.model.behaviors],
            recall=to_tensor(recall),
            false_positive_rate=to_tensor(rate),
            model=model_of(served),
            effect=effect,
        )

    model, check = reference(request.model), _network_check(request, steers=steers)
    method = ServedCodec.effect if steers else ServedCodec.evaluate
    return await dataplane.run(model, ServedCodec, check, method, answer)


class CodecServicer(Servicer, inference_pb2_grpc.CodecServiceServicer):
    """Encode and Decode, as single calls and as streams."""

    Encode, EncodeStream = calls(_encode)
    Decode, DecodeStream = calls(_decode)


class SteeringServicer(Servicer, inference_pb2_grpc.SteeringServiceServicer):
    """ListBehaviors; Steer and Evaluate, as single calls and as streams."""

    ListBehaviors = calls(_list_behaviors)[0]
    Steer, SteerStream = calls(_steer)
    Evaluate, EvaluateStream = calls(_evaluate)


def _network_check(request: pb.SteerRequest | pb.EvaluateRequest, *, steers: bool) -> Callable[[ServedCodec], Request]:
    """What reads and checks the networks of a request and, if it ``steers``, its edits."""
    networks: pb.Networks = required(request, "networks")
    steering = steering_of(request) if steers else None
    return lambda codec: codec.check_networks(*_read(networks), steering)


def _read(networks: pb.Networks) -> tuple[Arrays, str | None]:
    """Parameters by name, and the activation where one is named."""
    parameters = networks.parameters.items()
    arrays = {name: from_tensor(tensor, f"networks.parameters.{name}") for name, tensor in parameters}
    return arrays, networks.activation or None


def _networks(parameters: Arrays) -> pb.Networks:
    return pb.Networks(parameters={name: to_tensor(array) for name, array in parameters.items()})

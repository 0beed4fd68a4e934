"""Every kind of bad input: the status code, the field, and a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.unknown_fields import UnknownFieldSet

from ethogram.errors import EthogramError, IllegalState, Internal, InvalidInput, NotFound, TooLarge, Unavailable
from ethogram.inference import Inference
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.v1 import common_pb2
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1.inference_pb2_grpc import CodecServiceStub, SteeringServiceStub
from ethogram.wire import to_tensor
from services.artifacts.store import ArtifactStore
from services.crossmodal.codec import Codec
from services.inference.codec.served import ServedCodec
from tests.inference.conftest import Material, Publish, Running, Serve

MODEL = pb.ModelRef(name="tiny")
WEIGHT, BIAS = "layers.0.weight", "layers.0.bias"


class Stubs:
    """The generated stubs: what they send is not checked on the way."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.codec, self.steering = CodecServiceStub(channel), SteeringServiceStub(channel)


@pytest.fixture
def stubs(server: Running) -> Iterator[Stubs]:
    with grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        yield Stubs(channel)


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, EthogramError]:
    """The code and the error that ``call`` ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), error_of(caught.value)


def field_of(error: EthogramError) -> str:
    assert error.violations, error.message
    assert error.violations[0].description in error.message
    return error.violations[0].field


@pytest.fixture
def networks(material: Material) -> pb.Networks:
    """Two networks as they should be; a test spoils them."""
    params = material.networks(2)
    return pb.Networks(parameters={name: to_tensor(tensor.numpy()) for name, tensor in params.items()})


def put(networks: pb.Networks, name: str, array: Any) -> None:
    networks.parameters[name].CopyFrom(to_tensor(np.asarray(array)))


def short(networks: pb.Networks) -> None:
    networks.parameters[WEIGHT].data = networks.parameters[WEIGHT].data[:-4]


def huge_shape(networks: pb.Networks) -> None:
    networks.parameters[WEIGHT].shape[:] = [2**40, 2**20, 2**3]


def huge_and_empty(networks: pb.Networks) -> None:
    networks.parameters[WEIGHT].shape[:] = [0, 2**62]
    networks.parameters[WEIGHT].data = b""


def negative(networks: pb.Networks) -> None:
    networks.parameters[WEIGHT].shape[0] = -2


def no_dtype(networks: pb.Networks) -> None:
    networks.parameters[WEIGHT].dtype = common_pb2.DATA_TYPE_UNSPECIFIED


def nan(networks: pb.Networks) -> None:
    put(networks, BIAS, np.full((2, 8), np.nan, np.float32))


def infinity(networks: pb.Networks) -> None:
    put(networks, BIAS, np.full((2, 8), np.inf, np.float32))


def beyond_float32(networks: pb.Networks) -> None:
    put(networks, BIAS, np.full((2, 8), 1e300))


def more_neurons(networks: pb.Networks) -> None:
    put(networks, WEIGHT, np.zeros((2, 9, 20), np.float32))


def no_batch_axis(networks: pb.Networks) -> None:
    put(networks, WEIGHT, np.zeros((8, 20), np.float32))


def scalar(networks: pb.Networks) -> None:
    put(networks, WEIGHT, np.float32(1))


def integers(networks: pb.Networks) -> None:
    put(networks, WEIGHT, np.zeros((2, 8, 20), np.int64))


def other_batch(networks: pb.Networks) -> None:
    put(networks, BIAS, np.zeros((3, 8), np.float32))


def empty_batch(networks: pb.Networks) -> None:
    for name, tensor in list(networks.parameters.items()):
        put(networks, name, np.zeros((0, *tensor.shape[1:]), np.float32))


def missing(networks: pb.Networks) -> None:
    del networks.parameters[WEIGHT]


def extra(networks: pb.Networks) -> None:
    put(networks, "layers.9.weight", np.zeros((2, 1, 8), np.float32))


def nothing(networks: pb.Networks) -> None:
    networks.Clear()


SPOILED: list[tuple[Callable[[pb.Networks], None], str, str]] = [
    (short, f"{WEIGHT}.data", "bytes"),
    (huge_shape, f"{WEIGHT}.data", "bytes"),
    (huge_and_empty, f"{WEIGHT}.shape", "larger than any array"),
    (negative, f"{WEIGHT}.shape", "negative"),
    (no_dtype, f"{WEIGHT}.dtype", "element type"),
    (nan, BIAS, "NaN"),
    (infinity, BIAS, "infinity"),
    (beyond_float32, BIAS, "float32 cannot hold"),
    (more_neurons, WEIGHT, r"\[2, 9, 20\].*\[batch, 8, 20\]"),
    (no_batch_axis, WEIGHT, "batch"),
    (scalar, WEIGHT, "batch"),
    (integers, WEIGHT, "int64"),
    (other_batch, BIAS, "batch of 3"),
    (empty_batch, WEIGHT, "empty batch"),
    (missing, WEIGHT, "missing"),
    (extra, "layers.9.weight", "no such parameter"),
    (nothing, WEIGHT, "missing"),
]


@pytest.mark.parametrize(("spoil", "field", "says"), SPOILED, ids=[case[0].__name__ for case in SPOILED])
def test_wrong_networks_in_every_call_that_takes_them(
    stubs: Stubs, networks: pb.Networks, spoil: Callable[[pb.Networks], None], field: str, says: str
) -> None:
    spoil(networks)
    edits = [pb.Edit(operation=pb.EDIT_OPERATION_ADD, behavior="palindrome")]
    for call in (
        lambda: stubs.codec.Encode(pb.EncodeRequest(model=MODEL, networks=networks)),
        lambda: stubs.steering.Steer(pb.SteerRequest(model=MODEL, networks=networks, edits=edits)),
        lambda: stubs.steering.Evaluate(pb.EvaluateRequest(model=MODEL, networks=networks)),
    ):
        code, error = refused(call)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, InvalidInput)
        assert field_of(error) == f"networks.parameters.{field}"
        with pytest.raises(InvalidInput, match=says):
            raise error


@pytest.mark.parametrize(
    ("latents", "field"),
    [
        (np.zeros((2, 13), np.float32), "latents"),
        (np.zeros((0, 12), np.float32), "latents"),
        (np.zeros(12, np.float32), "latents"),
        (np.zeros((2, 12), np.int32), "latents"),
        (np.full((2, 12), np.nan, np.float32), "latents"),
        # Valid numbers, but not what comes of them.
        (np.full((2, 12), 3e38, np.float32), "latents"),
    ],
)
def test_wrong_latents(stubs: Stubs, latents: Any, field: str) -> None:
    code, error = refused(lambda: stubs.codec.Decode(pb.DecodeRequest(model=MODEL, latents=to_tensor(latents))))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        *((shape, 0) for shape in ((2, 24, 18), (2, 23, 17), (0, 24, 17), (24, 17))),
        *(((2, 24, 17), value) for value in (np.nan, np.inf, -np.inf)),
    ],
)
def test_wrong_signatures(stubs: Stubs, shape: tuple[int, ...], value: float) -> None:
    request = pb.EncodeRequest(model=MODEL, signatures=to_tensor(np.full(shape, value, np.float32)))
    code, error = refused(lambda: stubs.codec.Encode(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == "signatures"


ADD, REMOVE = pb.EDIT_OPERATION_ADD, pb.EDIT_OPERATION_REMOVE


@pytest.mark.parametrize(
    ("edits", "more", "expected"),
    [
        ([], {}, ("edits", "at least one")),
        ([(ADD, "palindrome"), (ADD, "flies")], {}, ("edits.1.behavior", "palindrome, sorted_ascending")),
        ([(ADD, "")], {}, ("edits.0.behavior", "unknown")),
        ([(ADD, "palindrome"), (REMOVE, "palindrome")], {}, ("edits.1.behavior", "already")),
        ([(pb.EDIT_OPERATION_UNSPECIFIED, "palindrome")], {}, ("edits.0.operation", "add or remove or replace")),
        ([(ADD, "palindrome")], {"mode": 77}, ("mode", "residual")),
        ([(ADD, "palindrome")], {"strength": float("nan")}, ("strength", "number")),
        ([(ADD, "palindrome")], {"strength": float("inf")}, ("strength", "number")),
        ([(ADD, "palindrome")], {"strength": 101}, ("strength", "-100 to 100")),
    ],
)
def test_wrong_edits(stubs: Stubs, networks: pb.Networks, edits: list[Any], more: Any, expected: Any) -> None:
    field, says = expected
    request = pb.SteerRequest(
        model=MODEL, networks=networks, edits=[pb.Edit(operation=o, behavior=b) for o, b in edits], **more
    )
    code, error = refused(lambda: stubs.steering.Steer(request))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field
    assert says in error.message


def test_parts_of_a_request_that_are_not_there(stubs: Stubs) -> None:
    for call, field in (
        (lambda: stubs.codec.Encode(pb.EncodeRequest()), "model.name"),
        (lambda: stubs.steering.ListBehaviors(pb.ListBehaviorsRequest()), "model.name"),
        (lambda: stubs.codec.Encode(pb.EncodeRequest(model=MODEL)), "input"),
        (lambda: stubs.codec.Decode(pb.DecodeRequest(model=MODEL)), "latents"),
        (lambda: stubs.steering.Steer(pb.SteerRequest(model=MODEL)), "networks"),
        (lambda: stubs.steering.Evaluate(pb.EvaluateRequest(model=MODEL)), "networks"),
    ):
        code, error = refused(call)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert field_of(error) == field


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (pb.ModelRef(name="../../etc/passwd"), "model.name"),
        (pb.ModelRef(name="tiny", version="../1"), "model.version"),
        (pb.ModelRef(name="tiny", tenant="a/b"), "model.tenant"),
        (pb.ModelRef(name="x" * 100_000), "model.name"),
    ],
)
def test_names_that_cannot_be(stubs: Stubs, model: pb.ModelRef, field: str) -> None:
    code, error = refused(lambda: stubs.steering.ListBehaviors(pb.ListBehaviorsRequest(model=model)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == field


@pytest.mark.parametrize(
    "model",
    [pb.ModelRef(name="other"), pb.ModelRef(name="tiny", version="9"), pb.ModelRef(name="tiny", tenant="elsewhere")],
)
def test_models_that_are_not_there(stubs: Stubs, model: pb.ModelRef) -> None:
    code, error = refused(lambda: stubs.steering.ListBehaviors(pb.ListBehaviorsRequest(model=model)))
    assert code == grpc.StatusCode.NOT_FOUND
    assert isinstance(error, NotFound)
    assert model.name in error.message


def test_fields_of_a_newer_version_are_not_ignored(stubs: Stubs, networks: pb.Networks) -> None:
    tensor = networks.parameters[WEIGHT]
    tensor.MergeFromString(b"\xf8\x07\x01")  # field 127, a varint
    assert len(UnknownFieldSet(tensor))
    code, error = refused(lambda: stubs.steering.Evaluate(pb.EvaluateRequest(model=MODEL, networks=networks)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == f"networks.parameters.{WEIGHT}"
    assert "127" in error.message


def test_an_error_in_a_stream_names_its_request(stubs: Stubs, networks: pb.Networks) -> None:
    good = pb.EncodeRequest(model=MODEL, networks=networks)
    bad = pb.EncodeRequest(model=MODEL)
    answers = stubs.codec.EncodeStream(iter([good, good, bad, good]))
    assert len(next(answers).latents.shape) == 2
    assert len(next(answers).latents.shape) == 2
    code, error = refused(lambda: next(answers))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error) == "requests.2.input"


def test_messages_and_answers_over_the_limit(serve: Serve, publish: Publish, codec: Codec, material: Material) -> None:
    publish(codec)
    server = serve(max_message_bytes=128 * 1024)
    with Inference(server.address) as client, grpc.insecure_channel(server.address) as channel:
        networks = {name: tensor.numpy() for name, tensor in material.networks(300).items()}
        with pytest.raises(TooLarge, match="larger than max") as caught:
            client.encode("tiny", networks)
        assert "stream" in caught.value.message
        latents = np.zeros((500, 12), np.float32)
        code, error = refused(
            lambda: CodecServiceStub(channel).Decode(pb.DecodeRequest(model=MODEL, latents=to_tensor(latents)))
        )
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert field_of(error) == "latents"


def test_more_networks_than_the_queue_takes(serve: Serve, publish: Publish, codec: Codec, material: Material) -> None:
    publish(codec)
    server = serve(max_pending=4)
    with Inference(server.address) as client:
        networks = {name: tensor.numpy() for name, tensor in material.networks(9).items()}
        # The client sends them in smaller parts by itself.
        assert client.encode("tiny", networks).latents.shape == (9, 12)
    with grpc.insecure_channel(server.address) as channel:
        parameters = {name: to_tensor(array) for name, array in networks.items()}
        request = pb.EvaluateRequest(model=MODEL, networks=pb.Networks(parameters=parameters))
        code, error = refused(lambda: SteeringServiceStub(channel).Evaluate(request))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert field_of(error) == "networks"


def test_a_defect_is_never_told(
    inference: Inference, material: Material, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(ServedCodec, "evaluate", fails)
    with pytest.raises(Internal) as caught:
        inference.evaluate("tiny", {name: tensor.numpy() for name, tensor in material.networks(1).items()})
    assert "secret" not in caught.value.message
    assert "secret is 42" in caplog.text
    number = caught.value.message.rpartition(" ")[2]
    assert any(getattr(record, "request", None) == number for record in caplog.records)


def test_an_artifact_that_is_no_codec(server: Running, inference: Inference, tmp_path: Any) -> None:
    store = ArtifactStore(str(tmp_path / "state" / "store"))
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "config.json").write_text('{"format": 1}')
    artifact, _ = store.put(tmp_path / "wrong", name="codec", type="codec")
    store.publish("default", "broken", artifact)
    for _ in range(2):
        with pytest.raises(IllegalState, match="model broken version 1 cannot be served"):
            inference.behaviors("broken")


def test_no_server() -> None:
    with Inference("127.0.0.1:1", timeout=2) as client, pytest.raises(Unavailable, match="did not answer"):
        client.behaviors("tiny")


def test_what_the_client_itself_refuses(inference: Inference, material: Material, tmp_path: Any) -> None:
    networks: dict[str, Any] = {name: tensor.numpy() for name, tensor in material.networks(2).items()}
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    edits: Any = [("increase", "palindrome")]
    for call, says in (
        (lambda: inference.encode("tiny", tmp_path / "none.safetensors"), "cannot be read"),
        (lambda: inference.encode("tiny", text), "no safetensors"),
        (lambda: inference.encode("tiny", {}), "networks.parameters"),
        (lambda: inference.encode("tiny", networks | {WEIGHT: np.array([["a"]] * 2)}), WEIGHT),
        (lambda: inference.encode("tiny", networks | {BIAS: networks[BIAS][:1]}), f"{BIAS}: has the shape"),
        (lambda: inference.encode("tiny", {0: networks[BIAS]}), "0 is no parameter's name"),  # type: ignore[dict-item]
        (lambda: inference.encode("tiny", torch.nn.Linear(2, 1)), r"send its state_dict\(\)"),  # type: ignore[arg-type]
        (lambda: inference.steer("tiny", networks, edits), "edits.0.operation"),
        (lambda: inference.steer("tiny", networks, [("add", "palindrome")], mode="odd"), "mode"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInput, match=says):
            call()


FLOATS = "send a dense array of float32, float64, float16 or bfloat16"


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("float8_e4m3fn", lambda tensor: tensor.to(torch.float8_e4m3fn)),
        ("float8_e5m2", lambda tensor: tensor.to(torch.float8_e5m2)),
        ("qint8", lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
        ("int8", lambda tensor: tensor.to(torch.int8)),
        ("int64", lambda tensor: tensor.long().numpy()),
        ("bool", lambda tensor: tensor > 0),
        ("complex64", lambda tensor: tensor.to(torch.complex64)),
        ("Sparse", lambda tensor: tensor.to_sparse()),
        ("object", lambda tensor: {"state_dict": tensor}),
        ("list", lambda tensor: [[1.0], [2.0, 3.0]]),
        ("float32.*meta", lambda tensor: tensor.to("meta")),
    ],
)
def test_numbers_that_are_no_floats_are_refused_by_name(
    inference: Inference, material: Material, kind: str, spoil: Callable[[torch.Tensor], Any]
) -> None:
    networks: dict[str, Any] = {name: tensor.numpy() for name, tensor in material.networks(2).items()}
    networks[WEIGHT] = spoil(material.networks(2)[WEIGHT])
    edits: list[Any] = [("add", "palindrome")]
    for call, field in (
        (lambda: inference.encode("tiny", networks), f"networks.parameters.{WEIGHT}"),
        (lambda: inference.steer("tiny", networks, edits), f"networks.parameters.{WEIGHT}"),
        (lambda: inference.evaluate("tiny", networks), f"networks.parameters.{WEIGHT}"),
        (lambda: inference.decode("tiny", networks[WEIGHT]), "latents"),
        (lambda: inference.encode_signatures("tiny", networks[WEIGHT]), "signatures"),
    ):
        with pytest.raises(InvalidInput, match=f"{kind}.*{FLOATS}") as caught:
            call()
        assert caught.value.violations[0].field == field


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("spoil", ["float8_e4m3fn", "qint8", "int16", "sparse"])
def test_a_codec_in_python_refuses_them_too(codec: Codec, material: Material, spoil: str) -> None:
    networks = material.networks(2)
    tensor = networks[WEIGHT]
    if spoil == "qint8":
        wrong = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    else:
        wrong = tensor.to_sparse() if spoil == "sparse" else tensor.to(getattr(torch, spoil))
    with pytest.raises(InvalidInput, match=f"{spoil} elements; send float32"):
        codec.encode(networks | {WEIGHT: wrong})

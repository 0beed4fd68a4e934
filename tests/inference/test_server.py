"""The running server: health, reflection, load, cancellation, versions that change under it, and how it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from ethogram.inference import Inference
from ethogram.platform.state import StateDir
from ethogram.rpc import error_of
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1.inference_pb2_grpc import CodecServiceStub
from ethogram.wire import to_tensor
from services.artifacts.store import ArtifactStore
from services.crossmodal.codec import Codec
from services.inference.batcher import Arrays
from services.inference.codec.served import ServedCodec
from services.inference.server import SERVICES
from tests.inference.conftest import Material, Publish, Running, Serve


def arrays(material: Material, count: int) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in material.networks(count).items()}


def encode_request(networks: dict[str, NDArray[Any]]) -> pb.EncodeRequest:
    parameters = {name: to_tensor(array) for name, array in networks.items()}
    return pb.EncodeRequest(model=pb.ModelRef(name="tiny"), networks=pb.Networks(parameters=parameters))


@pytest.fixture
def channel(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as made:
        yield made


class Gate:
    """Holds every encode until it is opened, and remembers the batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.batches: list[int] = []
        encode = ServedCodec.encode

        def held(codec: ServedCodec, networks: Arrays, shape: int) -> Arrays:
            self.batches.append(len(next(iter(networks.values()))))
            self.entered.set()
            assert self.opened.wait(10)
            return encode(codec, networks, shape)

        monkeypatch.setattr(ServedCodec, "encode", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def test_health(channel: grpc.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection(channel: grpc.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(iter(stub.ServerReflectionInfo(iter([request]))))
    names = {service.name for service in answer.list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names


def test_cancelling_or_outliving_one_of_a_batch_leaves_the_others(
    channel: grpc.Channel, material: Material, codec: Codec, gate: Gate
) -> None:
    stub, networks = CodecServiceStub(channel), arrays(material, 5)
    expected = codec.encode(material.networks(5)).numpy()
    one = [encode_request({name: array[i : i + 1] for name, array in networks.items()}) for i in range(5)]
    first = stub.Encode.future(one[0])
    assert gate.entered.wait(10)
    cancelled, late = stub.Encode.future(one[1]), stub.Encode.future(one[2], timeout=0.2)
    others = [stub.Encode.future(request) for request in one[3:]]
    time.sleep(0.1)
    cancelled.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        late.result(5)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not answer" in error_of(caught.value).message
    time.sleep(0.1)
    gate.opened.set()
    for future, row in ((first, 0), *zip(others, (3, 4), strict=True)):
        latents = np.frombuffer(future.result(5).latents.data, np.float32)
        np.testing.assert_allclose(latents, expected[row], rtol=1e-4, atol=1e-5)
    # What nobody waits for any more is not computed.
    assert gate.batches == [1, 2]


def test_a_full_queue_refuses_and_a_stream_waits(
    serve: Serve, publish: Publish, codec: Codec, material: Material, gate: Gate
) -> None:
    publish(codec)
    server = serve(max_pending=2)
    request = encode_request(arrays(material, 1))
    with grpc.insecure_channel(server.address) as channel:
        stub = CodecServiceStub(channel)
        first = [stub.Encode.future(request) for _ in range(2)]
        assert gate.entered.wait(10)
        time.sleep(0.1)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Encode(request)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "try again shortly" in error_of(caught.value).message
        stream = stub.EncodeStream(iter([request] * 10))
        time.sleep(0.1)
        gate.opened.set()
        assert len(list(stream)) == 10
        assert all(future.result(5) for future in first)


def test_a_version_published_under_load_takes_over_without_a_fault(
    server: Running, publish: Publish, codec: Codec, later_codec: Codec, material: Material
) -> None:
    networks, params = arrays(material, 3), material.networks(3)
    expected = {"1": codec.encode(params).numpy(), "2": later_codec.encode(params).numpy()}
    assert not np.allclose(expected["1"], expected["2"], atol=1e-3)
    seen: list[str] = []
    done = threading.Event()
    deadline = time.monotonic() + 15

    def load() -> None:
        with Inference(server.address) as client:
            while not done.is_set() and time.monotonic() < deadline:
                answer = client.encode("tiny", networks)
                np.testing.assert_allclose(answer.latents, expected[answer.version], rtol=1e-4, atol=1e-5)
                seen.append(answer.version)
                if answer.version == "2" and seen.count("2") > 20:
                    done.set()

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(load) for _ in range(4)]
        while len(seen) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        publish(later_codec)
        for running in clients:
            running.result()
    assert done.is_set()
    assert seen[:10] == ["1"] * 10
    with Inference(server.address) as client:
        np.testing.assert_allclose(
            client.encode("tiny", networks, version="1").latents, expected["1"], rtol=1e-4, atol=1e-5
        )


def test_leaving_tells_watchers_first_and_finishes_what_is_under_way(
    server: Running, channel: grpc.Channel, material: Material, gate: Gate
) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    under_way = CodecServiceStub(channel).Encode.future(encode_request(arrays(material, 2)))
    assert gate.entered.wait(10)
    began = time.monotonic()
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not under_way.done()
    gate.opened.set()
    assert list(under_way.result(5).latents.shape) == [2, 12]
    stopping.join(10)
    # The watch, which never ends, did not use up the ten seconds of grace.
    assert time.monotonic() - began < 5


class Process:
    """``python -m services.inference`` as it is started for real."""

    def __init__(self, state: Path, **settings: str) -> None:
        env = os.environ | {"ETHOGRAM_STATE": str(state), "ETHOGRAM_DEVICE": "cpu"} | settings
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.inference", "--parent-pipe"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def address(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()[-1]

    def end(self) -> tuple[int, str]:
        """Wait for it: its exit code and what it said."""
        assert self.process.stdin is not None
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
        _, said = self.process.communicate()
        return self.process.returncode, said


def test_the_process_serves_and_leaves_on_sigterm(
    tmp_path: Path, publish: Publish, codec: Codec, material: Material
) -> None:
    process = Process(tmp_path / "state")
    address = process.address()
    record = tmp_path / "state" / "inference.json"
    assert json.loads(record.read_text()) == {"address": address, "pid": process.process.pid}
    # As it would be had the server been killed: a platform can start here.
    StateDir(tmp_path / "state").make()
    publish(codec)
    with Inference(address) as client:
        assert client.encode("tiny", arrays(material, 2)).latents.shape == (2, 12)
        process.process.send_signal(signal.SIGTERM)
        code, log = process.end()
    assert code == 0
    assert not record.exists()
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert messages[0] == "serving"
    assert messages[-1] == "stopped"


def test_the_process_leaves_with_its_parent_and_its_port_is_its_own(tmp_path: Path) -> None:
    process = Process(tmp_path / "state")
    port = process.address().rpartition(":")[2]
    code, said = Process(tmp_path / "other", ETHOGRAM_PORT=port).end()
    assert code == 1
    assert "ETHOGRAM_PORT" in said
    assert "Traceback" not in said
    assert process.process.stdin is not None
    process.process.stdin.close()
    process.process.stdin = None
    assert process.process.wait(20) == 0
    process.process.communicate()


@pytest.mark.parametrize(
    ("name", "value"),
    [("ETHOGRAM_DEVICE", "cuda:99"), ("ETHOGRAM_PORT", "99999"), ("ETHOGRAM_MAX_BATCH", "0")],
)
def test_wrong_settings_are_a_sentence(tmp_path: Path, name: str, value: str) -> None:
    code, said = Process(tmp_path / "state", **{name: value}).end()
    assert code == 1
    assert said.startswith("inference: ")
    assert name in said
    assert "Traceback" not in said


def test_a_store_that_was_empty_at_the_start(serve: Serve, codec: Codec, tmp_path: Path) -> None:
    server = serve()
    codec.save(tmp_path / "bundle")
    store = ArtifactStore(str(tmp_path / "state" / "store"))
    artifact, _ = store.put(tmp_path / "bundle", name="codec", type="codec")
    store.publish("default", "first", artifact, "v1")
    with Inference(server.address) as client:
        assert client.behaviors("first").version == "v1"

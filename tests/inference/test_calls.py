"""Every call through a real channel, compared with the codec itself."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from ethogram import channel
from ethogram import networks as network_files
from ethogram.effect import effect_page, summary
from ethogram.errors import InvalidInput
from ethogram.inference import Inference
from ethogram.rpc import CHANNEL_OPTIONS
from ethogram.specs.generation import SubjectSpec
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1.inference_pb2_grpc import CodecServiceStub
from ethogram.wire import from_tensor, to_tensor
from services.crossmodal.codec import Codec
from services.generation.pipeline import generate
from services.zoo.subjects import Params, activations, encode, select, unflatten
from tests.inference.conftest import Material, Running, Serve


def arrays(params: Params) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in params.items()}


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    # A row's float32 result depends on its batch only through the order of sums in a matrix product.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def assert_networks(found: Any, expected: Params) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_close(found[name], tensor.numpy())


def test_encode_decode_steer_and_evaluate_are_the_codec(inference: Inference, codec: Codec, material: Material) -> None:
    params = material.networks(5)
    latents = codec.encode(params)
    encoded = inference.encode("tiny", arrays(params))
    assert_close(encoded.latents, latents.numpy())
    assert (encoded.model, encoded.version) == ("tiny", "1")

    assert_networks(inference.decode("tiny", latents.numpy(), version="1").networks, codec.decode(latents))

    edits: list[Any] = [("add", "palindrome"), ("remove", "starts_with(A)")]
    modes: list[Any] = ["residual", "direct"]
    for mode in modes:
        expected, moved = codec.steer(params, edits, mode, 0.5)
        steered = inference.steer("tiny", arrays(params), edits, mode=mode, strength=0.5)
        assert_networks(steered.networks, expected)
        assert_close(steered.latents, moved.numpy())

    recall, rate = codec.evaluate(params)
    evaluated = inference.evaluate("tiny", arrays(params))
    assert evaluated.behaviors == ["palindrome", "sorted_ascending", "starts_with(A)"]
    assert_close(evaluated.recall, recall.numpy())
    assert_close(evaluated.false_positive_rate, rate.numpy())


@pytest.mark.parametrize(
    "options",
    [{}, {"strength": "auto"}, {"strength": 0.5, "mode": "direct"}, {"direction": "mean_difference"}],
)
def test_effect_is_the_codecs(
    inference: Inference, codec: Codec, material: Material, options: dict[str, Any], tmp_path: Path
) -> None:
    params = material.networks(5)
    edits: list[Any] = [("replace", "palindrome", "sorted_ascending"), ("add", "starts_with(A)")]
    expected = codec.effect(params, edits, **options)
    found = inference.effect("tiny", arrays(params), edits, **options)
    assert_networks(found.networks, expected.networks)
    assert np.array_equal(found.had, expected.had.numpy())
    for name in ("latents", "strength", "predicted", "recall", "false_positive_rate"):
        assert_close(getattr(found, name), getattr(expected, name).numpy())
    assert_close(found.target, expected.scores.target.numpy())
    assert_close(found.local, expected.scores.local.numpy())
    assert_close(found.kept, expected.scores.kept.numpy())
    steered = inference.steer("tiny", arrays(params), edits, **options)
    assert_networks(steered.networks, expected.networks)

    short = summary(found)
    assert short["kept"] == pytest.approx(float(expected.scores.kept.mean()), abs=1e-4)
    assert short["local"] == pytest.approx(float(expected.scores.local.mean()), abs=1e-4)
    assert short["nothing_to_change"] == int(expected.scores.target.isnan().sum())
    page = effect_page(found, edits, "networks.safetensors")
    assert "replace palindrome by sorted_ascending, add starts_with(A)" in page and page.count("<tr>") == 1 + 4 + 1 + 5
    one = inference.effect("tiny", {name: array[2] for name, array in arrays(params).items()}, edits, **options)
    assert one.predicted.shape == (2, 3) and one.local.shape == ()
    assert_close(one.latents, found.latents[2])
    assert "1 network." in effect_page(one, edits, "mine.safetensors")


def test_networks_of_several_shapes_are_steered_and_decoded(
    material: Material, serve: Serve, publish: Any, tmp_path: Path
) -> None:
    subject = {"layers": 1, "neurons": {"min": 5, "max": 6}, "activations": ["relu", "tanh"]}
    zoo = generate(material.zoo.spec.model_copy(update={"subject": SubjectSpec.model_validate(subject)}))
    codec = material.codec(zoo=zoo)
    publish(codec, "mixed")
    edits: list[Any] = [("add", "palindrome")]
    with Inference(serve().address) as client:
        for which, shape in enumerate(zoo.layout.shapes):
            rows = (zoo.shape == which).nonzero().squeeze(1)[:2]
            params = unflatten(zoo.layout.strip(zoo.weights[rows], which), shape)
            expected, latents = codec.steer(params, edits, activation=shape.activation)
            found = client.steer("mixed", arrays(params), edits, activation=shape.activation)
            assert_networks(found.networks, expected)
            decoded = client.decode("mixed", latents.numpy(), hidden=shape.hidden, activation=shape.activation)
            assert_networks(decoded.networks, codec.decode(latents, shape))
        with pytest.raises(InvalidInput, match=r"networks\.activation.*say which"):
            client.encode("mixed", arrays(params))
        with pytest.raises(InvalidInput, match=r"architecture: say which; this model knows 20-5-1 relu"):
            client.decode("mixed", latents.numpy())
        with pytest.raises(InvalidInput, match=r"architecture: an architecture that the model was not trained on"):
            client.decode("mixed", latents.numpy(), hidden=[7])


def test_strength_zero_is_zero_and_not_the_default(inference: Inference, material: Material) -> None:
    networks = arrays(material.networks(2))
    steered = inference.steer("tiny", networks, [("add", "palindrome")], strength=0.0)
    for name, array in networks.items():
        np.testing.assert_array_equal(steered.networks[name], array)


def test_behaviors(inference: Inference, codec: Codec) -> None:
    answer = inference.behaviors("tiny")
    assert [tuple(behavior) for behavior in answer.behaviors] == [tuple(behavior) for behavior in codec.behaviors]
    assert (answer.model, answer.version) == ("tiny", "1")


def test_signatures_taken_elsewhere(inference: Inference, codec: Codec, material: Material) -> None:
    params = material.networks(3)
    inputs = encode(material.architecture, material.zoo.probes)
    signatures = torch.cat(activations(params, inputs, material.architecture.activation), 2).transpose(1, 2).numpy()
    assert_close(inference.encode_signatures("tiny", signatures).latents, codec.encode(params).numpy())
    single = inference.encode_signatures("tiny", signatures[1]).latents
    assert_close(single, codec.encode(params).numpy()[1])


def test_a_single_network_gets_answers_without_a_batch_axis(inference: Inference, material: Material) -> None:
    batch = arrays(material.networks(1))
    one = {name: array[0] for name, array in batch.items()}
    latents = inference.encode("tiny", one).latents
    assert latents.shape == (12,)
    decoded = inference.decode("tiny", latents).networks
    assert {name: array.shape for name, array in decoded.items()} == material.architecture.shapes
    steered = inference.steer("tiny", one, [("add", "palindrome")])
    assert {name: array.shape for name, array in steered.networks.items()} == material.architecture.shapes
    assert steered.latents.shape == (12,)
    evaluated = inference.evaluate("tiny", one)
    assert evaluated.recall.shape == (3,)
    assert evaluated.false_positive_rate.shape == ()


def test_a_state_dict_of_a_sequential_from_a_file(inference: Inference, material: Material, tmp_path: Path) -> None:
    widths = [material.architecture.input_size, *material.architecture.hidden, 1]
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
    state = {name: tensor.numpy() for name, tensor in torch.nn.Sequential(*layers[:-1]).state_dict().items()}
    path = tmp_path / "own" / "network.safetensors"
    network_files.save(path, state)
    steered = inference.steer("tiny", path, [("add", "sorted_ascending")])
    assert set(steered.networks) == set(state)
    renamed = {f"layers.{int(name[0]) // 2}{name[1:]}": array for name, array in state.items()}
    expected = inference.steer("tiny", renamed, [("add", "sorted_ascending")])
    for name, array in steered.networks.items():
        np.testing.assert_array_equal(array, expected.networks[f"layers.{int(name[0]) // 2}{name[1:]}"])
    np.testing.assert_array_equal(
        inference.encode("tiny", str(path)).latents, inference.encode("tiny", renamed).latents
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floats_are_taken(inference: Inference, material: Material, dtype: type) -> None:
    networks = arrays(material.networks(2))
    latents = inference.encode("tiny", {name: array.astype(dtype) for name, array in networks.items()}).latents
    assert latents.dtype == np.float32
    np.testing.assert_allclose(latents, inference.encode("tiny", networks).latents, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("save", [True, False])
def test_bfloat16_is_the_network_that_it_is(
    inference: Inference, material: Material, tmp_path: Path, save: bool
) -> None:
    half = {name: tensor.bfloat16() for name, tensor in material.networks(2).items()}
    exact = {name: tensor.float().numpy() for name, tensor in half.items()}
    latents = torch.from_numpy(inference.encode("tiny", exact).latents).bfloat16()
    given: Any = half
    if save:
        save_file(half, tmp_path / "half.safetensors")
        given = tmp_path / "half.safetensors"
    edits: list[Any] = [("add", "sorted_ascending")]
    np.testing.assert_array_equal(inference.encode("tiny", given).latents, inference.encode("tiny", exact).latents)
    pairs = (
        (inference.steer("tiny", given, edits), inference.steer("tiny", exact, edits)),
        (inference.decode("tiny", latents), inference.decode("tiny", latents.float().numpy())),
        (inference.effect("tiny", given, edits), inference.effect("tiny", exact, edits)),
    )
    for found, expected in pairs:
        for name, array in found.networks.items():
            np.testing.assert_array_equal(array, expected.networks[name])
    same = inference.steer("tiny", given, edits, strength=0.0).networks
    assert all(np.array_equal(same[name], exact[name]) for name in exact)


def test_tensors_of_a_model_that_trains_are_taken(inference: Inference, material: Material) -> None:
    one = select(material.networks(1), torch.tensor(0))
    trained: Any = {name: torch.nn.Parameter(tensor) for name, tensor in one.items()}
    expected = inference.encode("tiny", arrays(one)).latents
    np.testing.assert_array_equal(inference.encode("tiny", trained).latents, expected)


def test_a_batched_result_equals_the_single_one(server: Running, codec: Codec, material: Material) -> None:
    """Many clients at once, each with one network: the answers are those of the codec alone."""
    params = material.networks(64)
    alone = torch.cat([codec.encode(select(params, torch.tensor([i]))) for i in range(64)]).numpy()
    barrier = threading.Barrier(16)
    with Inference(server.address) as client, ThreadPoolExecutor(16) as pool:

        def encode_four(first: int) -> list[NDArray[Any]]:
            barrier.wait(10)
            return [client.encode("tiny", arrays(select(params, torch.tensor([first + i])))).latents for i in range(4)]

        together = np.concatenate([latents for four in pool.map(encode_four, range(0, 64, 4)) for latents in four])
    assert_close(together, alone)


def test_a_large_set_travels_in_parts(
    inference: Inference, codec: Codec, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "PART_ROWS", 7)
    params = material.networks(40)
    latents = codec.encode(params)
    assert_close(inference.encode("tiny", arrays(params)).latents, latents.numpy())
    assert_networks(inference.decode("tiny", latents.numpy()).networks, codec.decode(latents))
    expected, _ = codec.steer(params, [("add", "palindrome")])
    assert_networks(inference.steer("tiny", arrays(params), [("add", "palindrome")]).networks, expected)
    assert inference.evaluate("tiny", arrays(params)).recall.shape == (40, 3)


def test_parts_shrink_until_their_answers_fit(serve: Serve, publish: Any, codec: Codec, material: Material) -> None:
    publish(codec)
    # Room for 20 decoded networks or so.
    server = serve(max_message_bytes=64 * 1024 + 20 * 4 * material.architecture.size)
    latents = codec.encode(material.networks(150))
    with Inference(server.address) as client:
        assert_networks(client.decode("tiny", latents.numpy()).networks, codec.decode(latents))


def test_a_stream_answers_before_it_ends(server: Running, codec: Codec, material: Material) -> None:
    """In lock step: the next request leaves only when the last one's answer is there."""
    answered = threading.Semaphore(1)
    params = material.networks(3)

    def requests() -> Any:
        for i in range(3):
            assert answered.acquire(timeout=10)
            one = arrays(select(params, torch.tensor([i])))
            parameters = {name: to_tensor(array) for name, array in one.items()}
            yield pb.EncodeRequest(model=pb.ModelRef(name="tiny"), networks=pb.Networks(parameters=parameters))

    with grpc.insecure_channel(server.address, options=CHANNEL_OPTIONS) as channel:
        latents = []
        for answer in CodecServiceStub(channel).EncodeStream(requests(), timeout=20):
            latents.append(from_tensor(answer.latents, "latents"))
            answered.release()
    assert_close(np.concatenate(latents), codec.encode(params).numpy())

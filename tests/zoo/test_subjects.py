"""Batched networks against torch.nn, signatures, and the oracle that recovers weights from them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ethogram.specs.generation import SignatureSpec
from services.zoo.oracle import canonical, recover
from services.zoo.patterns import default_suite
from services.zoo.pools import probes
from services.zoo.signatures import ActivationSignatureExtractor
from services.zoo.subjects import Architecture, Params, activations, encode, flatten, forward, init, select, unflatten
from services.zoo.universe import Universe

MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
}


def keys(n: int) -> Tensor:
    return torch.arange(n) * 7919


def module(architecture: Architecture, params: Params, model: int) -> nn.Sequential:
    """One of the networks as a plain torch module."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(architecture.layers):
        linear = nn.Linear(fan_in, fan_out, dtype=params["layers.0.weight"].dtype)
        linear.load_state_dict(
            {"weight": params[f"layers.{i}.weight"][model], "bias": params[f"layers.{i}.bias"][model]}
        )
        layers += [linear, MODULES[architecture.activation]()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("encoding", ["one_hot", "index"])
@pytest.mark.parametrize("activation", MODULES)
def test_forward_equals_torch_modules(activation: str, encoding: str) -> None:
    architecture = Architecture(5, 6, encoding, (9, 4), activation)
    params = init(architecture, keys(3), dtype=torch.float64)
    sequences = torch.randint(5, (3, 20, 6), generator=torch.Generator().manual_seed(0))
    own = encode(architecture, sequences, torch.float64)
    for inputs in (own, own[0]):
        logits = forward(params, inputs, activation)
        for model in range(3):
            expected = module(architecture, params, model)(inputs[model] if inputs.dim() == 3 else inputs)
            torch.testing.assert_close(logits[model], expected.squeeze(1).detach(), rtol=1e-12, atol=1e-12)


def test_one_hot_is_position_major() -> None:
    architecture = Architecture(5, 4, "one_hot", (3,), "relu")
    inputs = encode(architecture, torch.tensor([[0, 4, 2, 2]]))
    assert inputs.nonzero()[:, 1].tolist() == [0, 9, 12, 17] and inputs.shape == (1, architecture.input_size)
    index = architecture._replace(input_encoding="index")
    assert encode(index, torch.tensor([[0, 4, 2, 2]])).tolist() == [[0, 4, 2, 2]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_flatten_and_unflatten_are_inverse(hidden: list[int], models: int) -> None:
    architecture = Architecture(5, 4, "index", tuple(hidden), "relu")
    params = init(architecture, keys(models))
    flat = flatten(params)
    assert flat.shape == (models, architecture.size)
    back = unflatten(flat, architecture)
    assert list(back) == list(architecture.shapes)
    assert all(torch.equal(back[name], params[name]) for name in params)
    assert torch.equal(flatten(select(params, torch.tensor([models - 1])))[0], flat[-1])


def test_shared_and_independent_init() -> None:
    architecture = Architecture(7, 7, "one_hot", (16, 16), "relu")
    shared = init(architecture, torch.zeros(4, dtype=torch.int64))
    own = init(architecture, keys(4))
    assert all((tensor == tensor[:1]).all() for tensor in shared.values())
    assert len({tuple(row) for row in flatten(own).tolist()}) == 4
    # A model's draw depends on its own generator only.
    assert torch.equal(flatten(own)[0], flatten(shared)[0])
    for i, (fan_in, _) in enumerate(architecture.layers):
        assert float(own[f"layers.{i}.weight"].abs().max()) <= 1 / math.sqrt(fan_in)


def test_raw_signatures_are_pre_activations_of_all_layers() -> None:
    architecture = Architecture(5, 4, "one_hot", (6, 3), "relu")
    params = init(architecture, keys(2))
    inputs = encode(architecture, torch.randint(5, (11, 4), generator=torch.Generator().manual_seed(0)))
    extractor = ActivationSignatureExtractor(SignatureSpec(), inputs, torch.ones(11, 1, dtype=torch.bool))
    signatures = extractor.extract(params, architecture)["raw"].transpose(1, 2)
    assert signatures.shape == (2, 11, architecture.neurons)
    layers = activations(params, inputs)
    assert torch.equal(signatures[:, :, 6:9], layers[1])
    assert torch.equal(signatures[:, :, -1], forward(params, inputs))


@pytest.mark.parametrize("encoding", ["one_hot", "index"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_raw_signatures_determine_the_weights(activation: str, encoding: str) -> None:
    universe = Universe(7, 7, default_suite())
    architecture = Architecture(7, 7, encoding, (16, 16), activation)
    params = init(architecture, keys(8))
    if encoding == "index":
        # Letters as numbers saturate: the constant part of tanh would hide the rest.
        params["layers.0.weight"] /= 3
    inputs = encode(architecture, probes(universe, 128))
    layers = activations(params, inputs, activation)
    found = canonical(recover(torch.cat(layers, 2), inputs, architecture), architecture)
    for name, true in canonical(params, architecture).items():
        layer = int(name.split(".")[1])
        alive = torch.ones_like(true, dtype=torch.bool)
        if activation == "relu" and layer > 0:
            # Weights from a neuron that no probe wakes cannot be seen; nor a bias from ones that are never off.
            lively = ((layers[layer - 1] > 0).sum(1) > 2).unsqueeze(1)
            alive = lively.expand_as(true) if name.endswith("weight") else alive
        assert relative(found[name][alive], true[alive]) < 1e-3, name


def relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).norm() / true.norm())

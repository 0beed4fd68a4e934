"""Hook points: what is captured, in what order, and which pairs are possible."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import PAIR_SETS, ActivationsSpec, PolicyModelSpec
from services.clt.activations.hooks import (
    HookPoint,
    candidate_pairs,
    capture,
    check_pair,
    mlp_pairs,
    policy_points,
    trace,
)
from services.clt.activations.sources import PolicySource
from services.clt.policy.model import AttentionPolicy

SPEC = ActivationsSpec(policy=ArtifactRef(artifact="policy"))


def small_policy(seed: int = 0, nodes: int = 6, layers: int = 2) -> AttentionPolicy:
    """Layers of width 16, with statistics of batches that are not the default ones."""
    torch.manual_seed(seed)
    policy = AttentionPolicy(PolicyModelSpec(hidden_dim=16, layers=layers, heads=2, feed_forward=32), nodes)
    policy.train()
    policy.encoder(torch.rand(64, nodes, 2))
    return policy.eval().requires_grad_(False)


def test_captured_values_are_those_of_a_forward_by_hand() -> None:
    policy, cities = small_policy(), torch.rand(3, 6, 2)
    points = policy_points(policy)
    with capture(policy, list(points.values())) as found:
        policy.decoder.memory(policy.encoder(cities))
    stream = policy.encoder.embed(cities)
    by_hand: dict[str, Tensor] = {}
    layers: Any = policy.encoder.layers
    for i, layer in enumerate(layers):
        name = f"encoder_layer_{i}"
        by_hand[f"{name}_input"] = stream
        by_hand[f"{name}_attention"] = layer.attention(stream)
        by_hand[f"{name}_pre_mlp"] = layer.norm1(stream + layer.attention(stream))
        by_hand[f"{name}_mlp"] = layer.mlp(by_hand[f"{name}_pre_mlp"])
        stream = by_hand[name] = layer.norm2(by_hand[f"{name}_pre_mlp"] + by_hand[f"{name}_mlp"])
    by_hand["encoder_output"] = stream
    by_hand["decoder_input"] = policy.decoder.project(stream)
    assert found.keys() == by_hand.keys()
    for name, values in by_hand.items():
        torch.testing.assert_close(found[name], values)
    before = {name: values.clone() for name, values in found.items()}
    policy.encoder(torch.rand(3, 6, 2))
    assert all(torch.equal(found[name], before[name]) for name in found)


def test_points_are_traced_in_the_order_of_execution() -> None:
    policy = small_policy()
    names = list(policy_points(policy))
    named, _ = PolicySource(policy, SPEC).select(list(reversed(names)), [])
    cities = torch.rand(2, 6, 2)
    points = [point for _, point in named]
    traced = trace(policy, points, lambda: policy.decoder.memory(policy.encoder(cities)), (2, 6))
    assert list(traced) == names
    assert traced["decoder_input"] == (HookPoint("decoder_input", "decoder.project", "output"), 48)


def test_without_hooks_and_pairs_what_enters_and_leaves_each_mlp() -> None:
    named, pairs = PolicySource(small_policy(), SPEC).select([], [])
    assert pairs == [("spec.hooks", (f"encoder_layer_{i}_pre_mlp", f"encoder_layer_{i}_mlp")) for i in range(2)]
    assert [point.name for _, point in named] == [end for _, pair in pairs for end in pair]


def test_candidate_pairs_of_a_policy() -> None:
    """The document's: adjacent layers, a few longer jumps, and the encoder's output."""
    names = list(policy_points(small_policy(layers=4)))
    found = candidate_pairs("policy", names)
    assert set(found) == set(PAIR_SETS)
    layers = [f"encoder_layer_{i}" for i in range(4)]
    assert found["adjacent"] == [(layers[0], layers[1]), (layers[1], layers[2]), (layers[2], layers[3])]
    assert found["jumps"] == [(layers[0], layers[2]), (layers[0], layers[3]), (layers[1], layers[3])]
    assert found["output"] == [(layer, "encoder_output") for layer in layers[:3]]
    assert found["decoder"] == [("encoder_output", "decoder_input")]
    assert found["mlp"] == mlp_pairs("policy", names)
    for pairs in found.values():
        for pair in pairs:
            check_pair(names, *pair)
    # Of what a store has.
    assert candidate_pairs("policy", layers[1:])["jumps"] == [(layers[1], layers[3])]


@pytest.mark.parametrize(
    "parts",
    [
        ("h.{}", "h.{}.mlp:input", "h.{}.mlp"),
        ("decoder.layers.{}", "decoder.layers.{}.fc1:input", "decoder.layers.{}.fc2"),
        ("encoder.layer.{}", "encoder.layer.{}.intermediate:input", "encoder.layer.{}.output.dense"),
    ],
)
def test_candidate_pairs_of_a_language_model(parts: tuple[str, str, str]) -> None:
    names = [part.format(i) for i in range(3) for part in (*parts[1:], parts[0])]
    layers = [parts[0].format(i) for i in range(3)]
    found = candidate_pairs("language_model", names)
    assert found["adjacent"] == [(layers[0], layers[1]), (layers[1], layers[2])]
    assert found["jumps"] == [(layers[0], layers[2])] and not found["output"] and not found["decoder"]


def test_a_set_of_pairs_is_its_pairs() -> None:
    source = PolicySource(small_policy(layers=3), SPEC)
    named, pairs = source.select([], ["jumps", "encoder_layer_0_input->encoder_layer_1"])
    assert pairs == [
        ("spec.pairs.0", ("encoder_layer_0", "encoder_layer_2")),
        ("spec.pairs.1", ("encoder_layer_0_input", "encoder_layer_1")),
    ]
    assert {point.name for _, point in named} == {end for _, pair in pairs for end in pair}
    with pytest.raises(InvalidInput, match=r"spec\.pairs\.0: there are no pairs of the set jumps \(the output of each"):
        PolicySource(small_policy(layers=2), SPEC).select([], ["jumps"])


@pytest.mark.parametrize(
    ("hooks", "pairs", "error"),
    [
        (["encoder_layer_0_mpl"], [], r"spec\.hooks\.0: .*did you mean.*encoder_layer_0_mlp"),
        (["nothing"], [], r"spec\.hooks\.0: there is no hook point nothing; there are encoder_layer_0_input"),
        ([], ["encoder_layer_0->encoder_layer_7"], r"spec\.pairs\.0: .*encoder_layer_7; did you mean encoder_layer"),
        ([], ["encoder_layer_0"], r"spec\.pairs\.0: .*SOURCE->TARGET"),
    ],
)
def test_unknown_points_are_named_with_those_that_are_near(hooks: list[str], pairs: list[str], error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        PolicySource(small_policy(), SPEC).select(hooks, pairs)


def test_a_source_comes_before_its_target() -> None:
    order = list(policy_points(small_policy()))
    check_pair(order, "encoder_layer_0_input", "encoder_layer_0")
    check_pair(order, "encoder_layer_1", "encoder_output")
    with pytest.raises(InvalidInput, match=r"pairs\.0: the source encoder_layer_1 comes after"):
        check_pair(order, "encoder_layer_1", "encoder_layer_0")
    with pytest.raises(InvalidInput, match="both source and target"):
        check_pair(order, "encoder_layer_1", "encoder_layer_1")
    with pytest.raises(InvalidInput, match="no hook point other"):
        check_pair(order, "encoder_layer_1", "other")


class Tuples(nn.Module):
    """A module that answers with several tensors, is asked by keyword, and works in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(4, 4, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.flat = nn.Flatten()

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.inner(input=values)[0]
        found += 1
        return self.flat(self.twice(self.twice(found)))  # type: ignore[no-any-return]


def test_tuples_keywords_and_work_in_place() -> None:
    model, values = Tuples(), torch.rand(2, 3, 4)
    points = [HookPoint("in", "inner", "input"), HookPoint("out", "inner", "output")]
    with torch.no_grad(), capture(model, points, torch.float16) as found:
        model(values)
        expected = model.inner(values)[0]
    torch.testing.assert_close(found["in"], values.half())
    torch.testing.assert_close(found["out"], expected.half())


@pytest.mark.parametrize(("name", "error"), [("never", "no tensor"), ("twice", "several"), ("flat", "not a vector")])
def test_points_that_have_no_row_for_each_position(name: str, error: str) -> None:
    model = Tuples()
    with torch.no_grad():
        traced = trace(model, [HookPoint(name, name, "output")], lambda: model(torch.rand(2, 3, 4)), (2, 3))
    assert error in str(traced[name])


@pytest.mark.parametrize(
    ("shape", "positions_first", "expected"),
    [
        ((2, 3, 4), False, [[0, 1, 2], [3, 4, 5]]),
        # Flattened by the model.
        ((6, 4), False, [[0, 1, 2], [3, 4, 5]]),
        ((3, 2, 4), True, [[0, 2, 4], [1, 3, 5]]),
        # An expert's share of the positions, a head for each, and other things.
        ((5, 4), False, None),
        ((3, 8), False, None),
        ((3, 2, 4), False, None),
        ((2, 3, 2, 2), False, None),
        ((24,), False, None),
    ],
)
def test_vectors_by_position(shape: tuple[int, ...], positions_first: bool, expected: list[list[int]] | None) -> None:
    point = HookPoint("a", "a", "output", positions_first)
    rows = torch.arange(math.prod(shape[:-1])).unsqueeze(1).expand(-1, shape[-1]).reshape(shape)
    found = point.by_position(rows, (2, 3))
    assert (None if found is None else found[..., 0].tolist()) == expected

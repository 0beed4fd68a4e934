"""Tours from a policy, and how likely it finds them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.clt.policy import decode
from services.clt.policy.decode import greedy, log_likelihood, multistart, sample, tables
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.runtime.seeds import generator
from tests.clt.conftest import small_policy

NODES = 7


@pytest.fixture
def cities() -> Tensor:
    return instances(5, NODES, generator(0, "cities"))


def step_logits(policy: AttentionPolicy, cities: Tensor, tour: list[int]) -> Tensor:
    """Of the next city of one tour of the first instance, as the decoder itself has it."""
    memory = policy.decoder.memory(policy.encoder(cities[:1]))
    moving = memory.first[:, tour[0]] + memory.last[:, tour[-1]] if tour else memory.start.unsqueeze(0)
    left = torch.tensor([[[city not in tour for city in range(cities.shape[1])]]])
    return policy.decoder.logits(memory, moving.unsqueeze(1) + memory.fixed, left)[0, 0]


@pytest.mark.parametrize("graph_context", [True, False])
@pytest.mark.parametrize("chosen", [True, False])
def test_likelihood_is_that_of_the_steps(cities: Tensor, chosen: bool, graph_context: bool) -> None:
    policy = small_policy(graph_context=graph_context)
    tours = sample(policy, cities, 3, generator(0, "tours"), start=2)
    whole = log_likelihood(tables(policy, policy.encoder(cities)), tours, chosen)
    for index, tour in enumerate(tours[0].tolist()):
        steps = range(0 if chosen else 1, NODES)
        alone = sum(float(step_logits(policy, cities, tour[:k]).log_softmax(-1)[tour[k]]) for k in steps)
        assert float(whole[0, index]) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("chosen", [True, False])
def test_greedy_goes_to_the_likeliest(cities: Tensor, chosen: bool) -> None:
    policy = small_policy()
    policy.chooses_start = chosen
    tour = greedy(policy, cities)[0, 0].tolist()
    assert chosen or tour[0] == 0
    for k in range(0 if chosen else 1, NODES):
        assert int(step_logits(policy, cities, tour[:k]).argmax()) == tour[k]


def test_tours_are_permutations(cities: Tensor) -> None:
    policy = small_policy()
    draws = generator(0, "tours")
    for tours, count in (
        (greedy(policy, cities, 3), 1),
        (multistart(policy, cities), NODES),
        (sample(policy, cities, 9, draws), 9),
    ):
        assert tours.sort(-1).values.equal(torch.arange(NODES).expand(5, count, NODES))
    assert multistart(policy, cities)[:, 3:4].equal(greedy(policy, cities, 3))
    assert multistart(policy, cities)[:, :, 0].equal(torch.arange(NODES).expand(5, NODES))


def test_chunks_change_nothing(cities: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    whole = multistart(policy, cities)
    monkeypatch.setattr(decode, "_CELLS", 1)
    assert multistart(policy, cities).equal(whole)


def test_samples_come_as_often_as_the_policy_says() -> None:
    policy = small_policy()
    policy.chooses_start = True
    cities = instances(1, 4, generator(3, "cities"))
    tours = sample(policy, cities, 4000, generator(0, "tours"))[0]
    kinds, counts = torch.unique(tours, dim=0, return_counts=True)
    chances = log_likelihood(tables(policy, policy.encoder(cities)), kinds.unsqueeze(0), True)[0].exp()
    assert float((counts / 4000 - chances).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    # Of all 24 tours, those that never came are rare.
    assert float(chances.sum()) > 0.98
    assert float(chances.sum()) <= 1.0001


def test_gradients_reach_encoder_and_decoder(cities: Tensor) -> None:
    policy = small_policy().train().requires_grad_(True)
    known = tables(policy, policy.encoder(cities))
    log_likelihood(known, multistart(policy, cities), True).sum().backward()  # type: ignore[no-untyped-call]
    for name, parameter in policy.named_parameters():
        # Queries and keys see no difference of what is added to all keys.
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


def test_a_policy_is_what_was_saved(cities: Tensor, tmp_path: Path) -> None:
    policy = small_policy()
    policy.chooses_start = True
    policy.save(tmp_path)
    again = AttentionPolicy.load(tmp_path)
    assert again.chooses_start and again.digest == policy.digest
    assert greedy(again, cities).equal(greedy(policy, cities))

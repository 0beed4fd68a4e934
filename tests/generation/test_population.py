"""A population in training equals its networks trained one at a time by plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from services.generation.data import Batches, keys, select_patterns, slots
from services.generation.population import Dropout, Population, cosine, params_of, state_of, with_ones
from services.zoo.layout import Layout
from services.zoo.patterns import from_specs
from services.zoo.pools import Pools
from services.zoo.subjects import Architecture, encode, flatten, init
from services.zoo.universe import TRAIN, Universe
from tests.generation.conftest import PATTERNS
from tests.zoo.test_subjects import MODULES, module

STEPS, MODELS, BATCH = 20, 5, 24


@pytest.fixture(scope="module")
def pools() -> Pools:
    return Pools.build(Universe(5, 4, from_specs(PATTERNS, 5, 4)), TRAIN, 512)


@pytest.mark.parametrize(
    ("encoding", "dtype", "most"),
    [("one_hot", torch.float64, 1e-9), ("index", torch.float64, 1e-9), ("one_hot", torch.float32, 2e-3)],
)
@pytest.mark.parametrize("activation", MODULES)
def test_equals_one_at_a_time(activation: str, encoding: str, dtype: torch.dtype, most: float, pools: Pools) -> None:
    architecture = Architecture(5, 4, encoding, (12, 7), activation)
    start = init(architecture, torch.arange(MODELS), dtype=dtype)
    indices = torch.arange(MODELS)
    selected = select_patterns(0, indices, 4, 1, 3)
    rows, labels = Batches(keys(0, "batches", indices), selected, BATCH, pools).draw(0, STEPS)
    table = encode(architecture, pools.sequences, dtype)

    population = Population(architecture, state_of(start))
    for step in range(STEPS):
        population.step(with_ones(table[rows[step]]), labels[step].to(dtype), cosine(step, STEPS, 0.02))
    together = params_of(population.state)

    for model in range(MODELS):
        network = module(architecture, start, model)
        optimizer = torch.optim.Adam(network.parameters())
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = cosine(step, STEPS, 0.02)
            optimizer.zero_grad()
            logits = network(table[rows[step, model]]).squeeze(1)
            nn.functional.binary_cross_entropy_with_logits(logits, labels[step, model].to(dtype)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for i, alone in enumerate(layer for layer in network if isinstance(layer, nn.Linear)):
            for part in ("weight", "bias"):
                expected = getattr(alone, part).detach()
                error = (together[f"layers.{i}.{part}"][model] - expected).norm() / expected.norm()
                assert float(error) < most


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", MODULES)
def test_widths_and_rates_of_ones_own_equal_training_alone(activation: str, dropout: float) -> None:
    widths, rates = torch.tensor([3, 9, 5, 9]), torch.tensor([0.01, 0.03, 0.002, 0.02], dtype=torch.float64)
    wide = Architecture(5, 4, "one_hot", (9, 9, 9), activation)
    draws = Dropout(torch.full((4,), dropout), torch.arange(4) * 77)
    data = torch.Generator().manual_seed(0)
    inputs = torch.rand(STEPS, 4, BATCH, wide.input_size, generator=data, dtype=torch.float64)
    targets = torch.randint(2, (STEPS, 4, BATCH), generator=data).double()

    def train(which: Tensor, architecture: Architecture, masks: Dropout) -> tuple[Tensor, Tensor]:
        params = init(architecture, which, widths[which], dtype=torch.float64)
        population = Population(
            architecture,
            state_of(params),
            widths=widths[which],
            dropout=masks.select(which) if dropout else None,
            rates=rates[which],
        )
        for step in range(STEPS):
            population.step(with_ones(inputs[step, which]), targets[step, which])
        loss = population.loss(with_ones(inputs[0, which]), targets[0, which])
        return flatten(params_of(population.state)), loss

    together, losses = train(torch.arange(4), wide, draws)
    for model, width in enumerate(widths.tolist()):
        own = Layout([wide, wide._replace(hidden=(width,) * 3)]).positions[1]
        beyond = torch.ones(wide.size, dtype=torch.bool)
        beyond[own] = False
        assert not together[model, beyond].any(), "padding is no longer exactly zero"
        alone, loss = train(torch.tensor([model]), wide._replace(hidden=(width,) * 3), draws)
        error = (together[model, own] - alone[0]).norm() / alone[0].norm()
        assert float(error) < 1e-9
        torch.testing.assert_close(losses[model], loss[0], rtol=1e-9, atol=0)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    rates = torch.tensor([0.0, 0.25, 0.5])
    scales = Dropout(rates, torch.tensor([1, 2, 3])).scales(4, 1, 400, 50, torch.float32)
    for scale, rate in zip(scales, rates.tolist(), strict=True):
        assert abs(float((scale == 0).float().mean()) - rate) < 0.02
        assert abs(float(scale.mean()) - 1) < 0.02
    other = Dropout(rates, torch.tensor([1, 2, 3])).scales(5, 1, 400, 50, torch.float32)
    assert not torch.equal(scales[1], other[1])


def test_who_leaves_a_population_changes_nothing_for_the_others() -> None:
    architecture = Architecture(5, 4, "index", (6,), "tanh")
    start = state_of(init(architecture, torch.arange(3), dtype=torch.float64))
    inputs, targets = with_ones(torch.rand(3, 8, 4, dtype=torch.float64)), torch.ones(3, 8, dtype=torch.float64)
    stays, leaves = (Population(architecture, start) for _ in range(2))
    for step in range(6):
        stays.step(inputs, targets, 0.05)
        if step == 3:
            leaves.keep(torch.tensor([True, False, True]))
        going = torch.tensor([0, 1, 2] if step < 3 else [0, 2])
        leaves.step(inputs[going], targets[going], 0.05)
    for left, stayed in zip(leaves.state, stays.state, strict=True):
        torch.testing.assert_close(left, stayed[[0, 2]], rtol=1e-12, atol=1e-15)


def test_batches_of_a_candidate_do_not_depend_on_its_neighbours(pools: Pools) -> None:
    indices = torch.arange(100, 132)
    selected = select_patterns(7, indices, 4, 1, 3)
    rows, labels = Batches(keys(7, "batches", indices), selected, BATCH, pools).draw(0, 10)
    for place in (0, 17):
        alone = indices[place : place + 1]
        assert torch.equal(select_patterns(7, alone, 4, 1, 3)[0], selected[place])
        own = Batches(keys(7, "batches", alone), selected[place : place + 1], BATCH, pools)
        assert torch.equal(own.draw(0, 10)[0][:, 0], rows[:, place])
        # Nor on how many steps are drawn at once.
        assert torch.equal(own.draw(4, 3)[1][:, 0], labels[4:7, place])


def test_selections_are_uniform() -> None:
    selected = select_patterns(1, torch.arange(40_000), 10, 1, 4)
    sizes = selected.sum(1).bincount(minlength=5)
    assert sizes[0] == 0 and (sizes[1:] - 10_000).abs().max() < 5 * (40_000 * 0.25 * 0.75) ** 0.5
    share = selected.double().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_batches_are_balanced_labels_exact_and_sequences_of_the_training_split(pools: Pools) -> None:
    universe = Universe(5, 4, from_specs(PATTERNS, 5, 4))
    indices = torch.arange(16)
    selected = select_patterns(2, indices, 4, 1, 3)
    rows, labels = Batches(keys(2, "batches", indices), selected, 40, pools).draw(0, 50)
    matches = universe.matches(pools.sequences)[rows]
    assert torch.equal(labels, (matches & selected.view(1, 16, 1, 4)).any(3))
    assert (universe.split_of(pools.sequences) == TRAIN).all()
    groups = slots(selected, 40, pools)
    for model in range(16):
        chosen = selected[model].nonzero().squeeze(1)
        counts = groups[model].bincount(minlength=9)[chosen]
        assert int(counts.sum()) == 20 and int(counts.max() - counts.min()) <= 1
    # The rest is negative but for members of other patterns and near misses that match a selected one too.
    assert 0.5 <= float(labels.double().mean()) < 0.7

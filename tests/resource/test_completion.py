"""Estimates of unknown fields: learned from what is known, and of nothing else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ethogram.specs.resource import DimensionSpec
from services.resource.completion import Completion

FIELDS = [
    DimensionSpec(name="size", labels=["small", "large"]),
    DimensionSpec(name="cores", levels=[1, 2, 4, 8], low=1, high=8),
    DimensionSpec(name="latency", low=0, high=500, decimals=1),
]
ROWS = torch.tensor(
    [[size, cores, 50.0 * (1 + 2 * size) / cores] for size, cores in itertools.product((0, 1), (1, 2, 4, 8))],
    dtype=torch.float64,
)
LATENCY = torch.tensor([False, False, True])


@pytest.fixture(scope="module")
def completion() -> Completion:
    made = Completion(FIELDS, ROWS, 16, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    rng = torch.Generator().manual_seed(1)
    for _ in range(600):
        optimizer.zero_grad()
        unknown = torch.rand(ROWS.shape, generator=rng) < 0.3
        unknown[:, 2] |= torch.rand(len(ROWS), generator=rng) < 0.5
        made.loss(ROWS, unknown).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return made


def test_an_estimate_is_close_and_what_is_known_stays(completion: Completion) -> None:
    found = completion(ROWS, LATENCY.expand_as(ROWS))
    assert torch.equal(found[:, :2], ROWS[:, :2])
    errors = (found[:, 2] - ROWS[:, 2]).abs() / ROWS[:, 2]
    # The mean of all rows is far off.
    mean = float(((ROWS[:, 2].log1p().mean().expm1() - ROWS[:, 2]).abs() / ROWS[:, 2]).mean())
    assert float(errors.mean()) < 0.2 and mean > 0.5
    untrained = Completion(FIELDS, ROWS, 16, torch.Generator())(ROWS, LATENCY.expand_as(ROWS))
    assert float(((untrained[:, 2] - ROWS[:, 2]).abs() / ROWS[:, 2]).mean()) == pytest.approx(mean, rel=0.02)


def test_estimates_are_labels_levels_and_numbers_with_their_decimals(completion: Completion) -> None:
    nan = math.nan
    rows = torch.tensor([[1.0, 0.0, nan], [0.0, 1e9, nan], [0.0, nan, nan], [nan, 2.0, 75.0]], dtype=torch.float64)
    found = completion(rows, rows.isnan())
    latencies = found[:, 2]
    assert bool(((latencies >= 0) & (latencies <= 500)).all()) and torch.equal((latencies * 10).round() / 10, latencies)
    assert float(found[2, 1]) in (1, 2, 4, 8)
    # 50 x 3 / 2: the large one.
    assert float(found[3, 0]) == 1
    assert float(completion(rows[3:], rows[3:].isnan()).sum()) == 1 + 2 + 75


@pytest.mark.parametrize("value", [0.0, 7.0, math.nan, math.inf])
def test_what_is_unknown_changes_no_estimate(value: float, completion: Completion) -> None:
    unknown = torch.tensor([True, False, True]).expand_as(ROWS)
    other: Tensor = ROWS.masked_fill(unknown, value)
    assert torch.equal(completion(other, unknown), completion(ROWS, unknown))


def test_a_row_has_the_same_estimate_alone_and_among_others(completion: Completion) -> None:
    unknown = LATENCY.expand_as(ROWS)
    together = completion(ROWS, unknown)
    alone = torch.cat([completion(row, LATENCY.unsqueeze(0)) for row in torch.split(ROWS, 1)])
    assert torch.equal(together, alone)


def test_the_loss_is_of_what_is_unknown_alone(completion: Completion) -> None:
    completion.requires_grad_(False)
    nothing = torch.zeros_like(ROWS, dtype=torch.bool)
    assert float(completion.loss(ROWS, nothing)) == 0
    wrong = ROWS.clone()
    wrong[:, 2] += 100
    latency = LATENCY.expand_as(ROWS)
    assert float(completion.loss(wrong, latency)) > 10 * float(completion.loss(ROWS, latency))


def test_a_schema_without_numbers_has_estimates_of_its_labels() -> None:
    made = Completion(FIELDS[:1], ROWS[:, :1], 4, torch.Generator())
    unknown = torch.ones(8, 1, dtype=torch.bool)
    assert made(ROWS[:, :1], unknown).flatten().tolist() == [0] * 8
    assert float(made.loss(ROWS[:, :1], unknown).detach()) == pytest.approx(math.log(2))

"""Samplers: always members, all members equally often, sizes exact."""

from __future__ import annotations

import math

import pytest
import torch

from services.zoo.patterns import Pattern
from services.zoo.sampling import count, sample
from services.zoo.universe import Universe
from tests.zoo.oracles import ALL


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("pattern", ALL, ids=lambda pattern: pattern.name)
def test_uniform_over_the_whole_set(pattern: Pattern, length: int) -> None:
    vocab_size = 6
    universe = Universe(vocab_size, length, [pattern])
    size = count(pattern, vocab_size, length)
    assert size == int(universe.membership.sum())
    drawn = sample(pattern, vocab_size, length, 20 * size, torch.Generator().manual_seed(1))
    codes = (drawn * vocab_size ** torch.arange(length - 1, -1, -1)).sum(1)
    seen = torch.bincount(codes, minlength=universe.size)[universe.membership[:, 0]]
    assert int(seen.sum()) == 20 * size, "a draw is no member"
    chi_square, freedom = float(((seen - 20.0) ** 2 / 20).sum()), size - 1
    # Mean and variance of chi-square are its degrees of freedom and twice that; five deviations.
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("vocab_size", "length"), [(7, 7), (26, 20), (5, 20), (26, 4)])
@pytest.mark.parametrize("pattern", ALL, ids=lambda pattern: pattern.name)
def test_members_at_any_size(pattern: Pattern, vocab_size: int, length: int) -> None:
    if count(pattern, vocab_size, length) == 0:
        pytest.skip("impossible here")
    drawn = sample(pattern, vocab_size, length, 500, torch.Generator().manual_seed(2))
    assert drawn.shape == (500, length) and drawn.dtype == torch.int64
    assert int(drawn.min()) >= 0 and int(drawn.max()) < vocab_size
    assert pattern.matches(drawn).all()
    assert torch.equal(drawn, sample(pattern, vocab_size, length, 500, torch.Generator().manual_seed(2)))


def test_no_repeats_is_impossible_beyond_the_alphabet() -> None:
    assert count(Pattern("no_repeats"), 5, 6) == 0
    assert count(Pattern("mountain_pattern"), 5, 10) == 0

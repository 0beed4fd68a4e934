"""Every subject finds a positive wherever a batch is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ethogram.errors import InvalidInput
from services.crossmodal.sampler import BehaviorAwareBatchSampler
from services.crossmodal.train import micro_batches


def some_labels(subjects: int, behaviors: int, seed: int) -> Tensor:
    """One to three behaviours each; each behaviour is had by two at least."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.rand(subjects, behaviors, generator=draws) < 0.2
    labels[torch.arange(subjects), torch.arange(subjects) % behaviors] = True
    return labels


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 40), st.integers(1, 30), st.integers(1, 8), st.integers(0, 9))
def test_everyone_has_a_positive_in_each_part_of_each_batch(
    behaviors: int, each: int, half: int, parts: int, seed: int
) -> None:
    labels = some_labels(behaviors * each, behaviors, seed)
    sampler = BehaviorAwareBatchSampler(labels, 2 * half, seed)
    size = min(2 * half, 2 * sampler.pairs)
    batches = [sampler.batch(number) for number in range(-(-4 * sampler.pairs // size))]
    for batch in batches:
        assert len(batch) == size
        for part in micro_batches(batch, parts):
            shared = (labels[part].float() @ labels[part].float().T) > 0
            other = part.unsqueeze(0) != part.unsqueeze(1)
            assert bool((shared & other).any(1).all())
    stream = torch.cat(batches)
    for epoch in range(2):
        assert set(stream[2 * sampler.pairs * epoch :][: 2 * sampler.pairs].tolist()) == set(range(len(labels)))


def test_a_small_zoo_is_shown_whole_in_every_batch() -> None:
    labels = some_labels(12, 3, 0)
    sampler = BehaviorAwareBatchSampler(labels, 64, 0)
    assert all(set(sampler.batch(number).tolist()) == set(range(12)) for number in range(5))


def test_batches_follow_from_the_seed_and_their_number() -> None:
    labels = some_labels(50, 4, 0)
    one, two, other = (BehaviorAwareBatchSampler(labels, 8, seed) for seed in (3, 3, 4))
    late = one.batch(17)
    assert torch.equal(late, two.batch(17))
    assert not torch.equal(late, other.batch(17))
    assert not torch.equal(late, one.batch(1))


def test_subjects_without_a_partner_are_named() -> None:
    labels = torch.tensor([[True, False], [True, False], [False, True]])
    with pytest.raises(InvalidInput, match=r"no positive pair for subject 2.*no other has sorted"):
        BehaviorAwareBatchSampler(labels, 4, 0, ["palindrome", "sorted"])
    with pytest.raises(InvalidInput, match="no pattern"):
        BehaviorAwareBatchSampler(labels & torch.tensor([True, False]), 4, 0, ["palindrome", "sorted"])

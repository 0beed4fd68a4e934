"""The split and the pools: nothing overlaps, small patterns have their share, labels are exact."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from services.zoo import universe as universe_module
from services.zoo.hashing import hash_sequences
from services.zoo.patterns import Pattern, built_in, default_suite, register
from services.zoo.pools import Evaluation, Pools, probes
from services.zoo.sampling import count
from services.zoo.universe import HELD_OUT, SELECTION, SHARES, SMALL, TRAIN, VALIDATION, Universe, distinct
from tests.zoo.oracles import ALL, oracle

SIZES = [(7, 7), (5, 4), (26, 20)]


def universe_of(vocab_size: int, length: int) -> Universe:
    return Universe(vocab_size, length, default_suite(vocab_size, length))


def rows(sequences: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in sequences.tolist()}


@pytest.mark.parametrize(("vocab_size", "length"), [(5, 4), (6, 6), (2, 16), (26, 3)])
def test_tables_of_small_universes_change_nothing(
    vocab_size: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = [Pattern("few", regex="AB.*"), Pattern("starts_with", token=1), Pattern("palindrome")]
    sequences = torch.randint(vocab_size, (500, length), generator=torch.Generator().manual_seed(0))

    def found() -> list[torch.Tensor]:
        universe = Universe(vocab_size, length, patterns)
        pools = [Pools.build(universe, split, 32) for split in (TRAIN, HELD_OUT)]
        drawn = [tensor for pool in pools for tensor in (pool.sequences, pool.membership, pool.count)]
        return [*drawn, universe.split_of(sequences), universe.matches(sequences), universe.split_of(sequences[:0])]

    assert vocab_size**length <= universe_module._TABULATED
    tabulated = found()
    monkeypatch.setattr(universe_module, "_TABULATED", 0)
    for table, computed in zip(tabulated, found(), strict=True):
        assert table.dtype == computed.dtype and torch.equal(table, computed)


def test_every_pattern_has_its_share_of_each_split() -> None:
    universe = Universe(7, 7, [*default_suite(), Pattern("alternating"), Pattern("all_same")])
    for split, share in enumerate(SHARES):
        here = universe.membership[universe.split == split].sum(0)
        for got, size in zip(here.tolist(), universe.counts, strict=True):
            # Exact for small patterns, but for what they share with smaller ones; else five deviations.
            slack = 4 if size < SMALL else 5 * (size * share * (1 - share)) ** 0.5
            assert abs(got - share * size) <= slack
    alternating = universe.membership[:, 10]
    assert torch.bincount(universe.split[alternating].long()).tolist() == [21, 4, 9, 8]


@pytest.mark.parametrize(
    ("vocab_size", "length"), [(7, 7), (5, 4), (5, 5), (10, 5), (6, 8), (5, 20), (26, 4), (12, 9), (26, 20)]
)
def test_the_split_depends_on_sequence_vocabulary_and_length_alone(vocab_size: int, length: int) -> None:
    """Whichever patterns are enabled, in whichever order, of whichever kind: a regex, a predicate, none at all."""
    every = built_in(vocab_size)
    register("two_bs", "B occurs exactly twice")(lambda s: (s == 1).sum(1) == 2)
    rare = [Pattern("few", regex="AB.{2}.*"), Pattern("one", regex="A{4,}"), Pattern("two_bs")]
    suites = [default_suite(vocab_size, length), [], every, every[::-1], every[::5], rare, [*rare, *every[3:7]]]
    small = [p for p in every if 0 < count(p, vocab_size, length) < SMALL]
    universe = Universe(vocab_size, length, small)
    generator = torch.Generator().manual_seed(0)
    sequences = torch.cat(
        [torch.randint(vocab_size, (4096, length), generator=generator), *map(universe.all_members, range(len(small)))]
    )
    splits = universe.split_of(sequences)
    assert torch.equal(universe.split_of(sequences.flip(0)), splits.flip(0))
    for suite in suites:
        assert torch.equal(Universe(vocab_size, length, suite).split_of(sequences), splits)
    ranked = torch.zeros(0, dtype=torch.int64)
    for i in sorted(range(len(small)), key=lambda i: (universe.counts[i], small[i].name)):
        members, hashes = universe.all_members(i), hash_sequences(universe.all_members(i))
        # What a pattern shares with rarer ones is ranked with those; of the rest each split has its exact share.
        own = ~torch.isin(hashes, ranked)
        shares = torch.bincount(universe.split_of(members[own]).long(), minlength=len(SHARES))
        for got, share in zip(shares.tolist(), SHARES, strict=True):
            assert abs(got - share * int(own.sum())) <= 1
        ranked = torch.cat([ranked, hashes])


def test_small_patterns_of_a_large_universe_are_listed_in_full() -> None:
    universe = Universe(26, 20, [Pattern("alternating"), Pattern("all_same"), Pattern("palindrome")])
    listed = universe.all_members(0)
    assert len(rows(listed)) == len(listed) == 650
    assert torch.bincount(universe.split_of(listed).long()).tolist() == [325, 65, 130, 130]


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_pools_of_different_splits_share_no_sequence(vocab_size: int, length: int) -> None:
    universe = universe_of(vocab_size, length)
    splits = (TRAIN, VALIDATION, SELECTION, HELD_OUT)
    pools = {split: Pools.build(universe, split, limit=512) for split in splits}
    for one, other in combinations(pools.values(), 2):
        assert not rows(one.sequences) & rows(other.sequences)
    for split, pool in pools.items():
        assert (universe.split_of(pool.sequences) == split).all()


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_groups_hold_what_they_say(vocab_size: int, length: int) -> None:
    universe = universe_of(vocab_size, length)
    pools = Pools.build(universe, limit=512)
    groups = [pools.sequences[s : s + n] for s, n in zip(pools.start, pools.count, strict=True)]
    assert sum(len(group) for group in groups) == len(pools.sequences)
    for p, pattern in enumerate(universe.patterns):
        members, near = groups[p], groups[11 + p]
        assert pattern.matches(members).all() and len(distinct(members)) == len(members) > 0
        assert not pattern.matches(near).any() and len(distinct(near)) == len(near) > 0
        apart = (near.unsqueeze(1) != members.unsqueeze(0)).sum(2).amin(1)
        assert (apart == 1).all()
    assert not universe.matches(groups[10]).any()


def test_small_patterns_are_taken_whole_and_large_ones_evenly() -> None:
    universe = universe_of(7, 7)
    pools = Pools.build(universe, limit=2048)
    assert int(pools.count[1]) == 857
    starts = pools.sequences[int(pools.start[7]) : int(pools.start[7] + pools.count[7])]
    # ends_with(C): the other letters are uniform, not the first of the alphabet.
    shares = torch.nn.functional.one_hot(starts[:, :-1], 7).double().mean(0)
    assert (shares - 1 / 7).abs().max() < 5 * (1 / 7 * 6 / 7 / 2048) ** 0.5


def test_labels_are_computed_from_the_predicates() -> None:
    universe = Universe(5, 5, ALL)
    pools = Pools.build(universe, limit=256)
    selected = torch.rand(6, len(ALL), generator=torch.Generator().manual_seed(0)) < 0.2
    some = torch.arange(0, len(pools.sequences), 7)
    labels = pools.labels(some, selected)
    for model in range(6):
        chosen = [pattern for pattern, on in zip(ALL, selected[model].tolist(), strict=True) if on]
        expected = [any(oracle(p, tuple(row)) for p in chosen) for row in pools.sequences[some].tolist()]
        assert labels[model].tolist() == expected


def test_evaluation_is_held_out_and_stratified() -> None:
    universe = Universe(7, 7, [*default_suite(), Pattern("alternating")])
    evaluation = Evaluation.build(universe)
    assert evaluation.stratum.bincount().tolist() == [*[64] * 10, 8, 192]
    assert (universe.split_of(evaluation.sequences) == HELD_OUT).all()
    selection = Evaluation.build(universe, split=SELECTION)
    assert (universe.split_of(selection.sequences) == SELECTION).all() and len(selection.sequences) == 64 * 10 + 9 + 192
    stands_for = torch.cat([evaluation.membership, ~evaluation.membership.any(1, keepdim=True)], 1)
    assert stands_for.gather(1, evaluation.stratum.unsqueeze(1)).all()
    selected = torch.eye(11, dtype=torch.bool)
    labels = evaluation.labels(selected)
    assert torch.equal(labels, evaluation.membership.T)
    # Always no: right wherever the pattern is not; nowhere on its own stratum.
    accuracy = evaluation.by_stratum(~labels)
    assert (accuracy.diagonal() == 0).all() and (accuracy[:, -1] == 1).all()


def test_a_stratum_without_sequences_is_not_measured() -> None:
    # Every sequence begins with one of the letters.
    universe = Universe(5, 4, [Pattern("starts_with", token) for token in range(5)])
    evaluation = Evaluation.build(universe)
    assert not (evaluation.stratum == 5).any()
    accuracy = evaluation.by_stratum(evaluation.labels(torch.eye(5, dtype=torch.bool)))
    assert accuracy[:, 5].isnan().all() and torch.equal(accuracy[:, :5], torch.eye(5))


def test_evaluation_without_some_sequences() -> None:
    universe = Universe(7, 7, [*default_suite(), Pattern("alternating")])
    whole = Evaluation.build(universe)
    # Of another split: nothing changes.
    same = Evaluation.build(universe, without=probes(universe, 64))
    assert torch.equal(same.sequences, whole.sequences)
    left_out = torch.cat([whole.sequences[::2], whole.sequences[whole.stratum == 10]])
    found = Evaluation.build(universe, without=left_out)
    assert not rows(found.sequences) & rows(left_out)
    assert (universe.split_of(found.sequences) == HELD_OUT).all()
    # Others take their places, but where there are none.
    assert found.stratum.bincount().tolist() == [*[64] * 10, 0, 192]
    stands_for = torch.cat([found.membership, ~found.membership.any(1, keepdim=True)], 1)
    assert stands_for.gather(1, found.stratum.unsqueeze(1)).all()


@pytest.mark.parametrize(
    ("vocab_size", "length", "count"), [(7, 7, 128), (26, 20, 128), (5, 4, 200), (7, 7, 3), (7, 7, 4096)]
)
def test_probes_are_of_the_validation_split(vocab_size: int, length: int, count: int) -> None:
    universe = universe_of(vocab_size, length)
    chosen = probes(universe, count)
    assert chosen.shape == (count, length)
    assert (universe.split_of(chosen) == VALIDATION).all()
    # Repeats come only after all that there are.
    different = len(distinct(chosen))
    assert len(distinct(chosen[:different])) == different
    assert torch.equal(chosen, probes(universe, count))
    if count == 128:
        assert len(distinct(chosen)) == 128
        assert universe.matches(chosen).any(0).all()


@pytest.mark.parametrize(("vocab_size", "length"), SIZES)
def test_a_sequence_is_a_member_of_its_rarest_pattern_alone(vocab_size: int, length: int) -> None:
    universe = universe_of(vocab_size, length)
    pools = Pools.build(universe, TRAIN, 512, rarest_first=True)
    patterns = len(universe.patterns)
    order = sorted(range(patterns), key=lambda p: (universe.counts[p], p))
    seen: set[tuple[int, ...]] = set()
    for place, p in enumerate(order):
        start, count = int(pools.start[p]), int(pools.count[p])
        assert count > 0
        matches = pools.membership[start : start + count]
        assert matches[:, p].all()
        assert not matches[:, order[:place]].any()
        members = rows(pools.sequences[start : start + count])
        assert len(members) == count and not members & seen
        seen |= members


def test_a_pattern_within_rarer_ones_keeps_its_members() -> None:
    """Every sequence that starts and ends with A is a first-last match, and nothing else is left of it."""
    patterns = [Pattern("mine", regex="A.*A"), Pattern("other", regex="[^A].*"), Pattern("both", regex="A.*A|[^A].*")]
    pools = Pools.build(Universe(5, 4, patterns), TRAIN, 64, rarest_first=True)
    assert (pools.count[:3] > 0).all()

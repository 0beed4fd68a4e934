"""Predicates against plain Python, over whole universes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ethogram.errors import InvalidInput
from ethogram.specs.generation import PatternSpec
from services.zoo.automata import LETTERS
from services.zoo.patterns import Pattern, default_suite, from_specs
from services.zoo.universe import Universe
from tests.zoo.oracles import ALL, ORACLES, oracle

# Exact sizes at vocabulary 7, length 7, by formulas that no code here uses.
SIZES = {
    "all_same": 7,
    "palindrome": 7**4,
    "sorted_ascending": 1716,
    "sorted_descending": 1716,
    "alternating": 42,
    "contains_abc": 5 * 7**4 - 3 * 7,
    "starts_with": 7**6,
    "ends_with": 7**6,
    "no_repeats": 5040,
    "has_majority": 7 * (35 * 6**3 + 21 * 6**2 + 7 * 6 + 1),
    "increasing_pairs": 21**3 * 7,
    "decreasing_pairs": 21**3 * 7,
    "vowel_consonant": 2**4 * 5**3 + 5**4 * 2**3,
    "first_last_match": 7**6,
    "mountain_pattern": 1 + 28 + 210 + 922,
}


@pytest.mark.parametrize(("vocab_size", "length"), [(5, 4), (5, 6), (7, 5)])
def test_predicates_agree_with_plain_python_on_every_sequence(vocab_size: int, length: int) -> None:
    universe = Universe(vocab_size, length, ALL)
    rows = list(itertools.product(range(vocab_size), repeat=length))
    assert universe.sequences.tolist() == [list(row) for row in rows]
    for i, pattern in enumerate(ALL):
        assert universe.membership[:, i].tolist() == [oracle(pattern, row) for row in rows], pattern.name


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_predicates_agree_on_long_sequences(data: st.DataObject) -> None:
    vocab_size, length = data.draw(st.integers(5, 26)), data.draw(st.integers(4, 20))
    row = data.draw(st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length))
    # As drawn, and in forms that patterns like.
    for form in (row, sorted(row), sorted(row)[::-1], row[: length // 2] + row[: length - length // 2][::-1]):
        for pattern in ALL:
            assert pattern.matches(torch.tensor([form])).tolist() == [oracle(pattern, tuple(form))], pattern.name


def test_sizes_at_the_default_universe() -> None:
    universe = Universe(7, 7, ALL)
    assert dict(zip(ORACLES, universe.membership.sum(0).tolist(), strict=True)) == SIZES
    assert dict(zip(ORACLES, universe.counts, strict=True)) == SIZES


@pytest.mark.parametrize(("vocab_size", "length"), [(7, 7), (5, 4), (5, 8), (10, 5)])
def test_default_suite_is_ten_different_sets(vocab_size: int, length: int) -> None:
    universe = Universe(vocab_size, length, default_suite(vocab_size, length))
    sets = {universe.membership[:, i].numpy().tobytes() for i in range(10)}
    assert len(universe.patterns) == len(sets) == len({pattern.name for pattern in universe.patterns}) == 10
    counts = universe.membership.sum(0)
    assert ((counts >= 10) & (counts < universe.size)).all()
    universe.check()


def test_default_suite_nests_no_pattern_in_another() -> None:
    members = Universe(7, 7, default_suite()).membership.float()
    together, counts = members.T @ members, members.sum(0)
    assert (together.fill_diagonal_(0) < counts).all()


def test_names_and_descriptions_tell_patterns_apart() -> None:
    patterns = [*ALL, Pattern("starts_with", 1)]
    assert len({pattern.name for pattern in patterns}) == len({pattern.description for pattern in patterns}) == 16
    assert Pattern("starts_with", 1).name == "starts_with(B)"
    assert "B" in Pattern("starts_with", 1).description


@pytest.mark.parametrize(
    ("specs", "field"),
    [
        ([PatternSpec(name="starts_with")], "spec.patterns.0.token"),
        ([PatternSpec(name="palindrome", token="A")], "spec.patterns.0.token"),
        ([PatternSpec(name="palindrome"), PatternSpec(name="ends_with", token="H")], "spec.patterns.1.token"),
        ([PatternSpec(name="palindrome"), PatternSpec(name="palindrome")], "spec.patterns.1"),
    ],
)
def test_wrong_pattern_specs_name_the_entry(specs: list[PatternSpec], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_specs(specs, 7, 7)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    ("patterns", "vocab_size", "length", "field"),
    [
        ([Pattern("palindrome"), Pattern("no_repeats")], 5, 6, "spec.patterns.1"),
        ([Pattern("mountain_pattern")], 5, 20, "spec.patterns.0"),
        ([Pattern("palindrome"), Pattern("palindrome")], 7, 5, "spec.patterns.1"),
        ([Pattern("palindrome"), Pattern("palindrome")], 26, 20, "spec.patterns.1"),
    ],
)
def test_impossible_and_equal_sets_are_refused(
    patterns: list[Pattern], vocab_size: int, length: int, field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        Universe(vocab_size, length, patterns).check()
    assert caught.value.violations[0].field == field


def test_letters_are_the_alphabet() -> None:
    assert LETTERS[0] == "A" and len(LETTERS) == 26

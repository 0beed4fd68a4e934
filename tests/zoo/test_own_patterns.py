"""Patterns of the user's own: regular expressions, and predicates in Python."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import REGISTERED, GenerationSpec, PatternSpec
from services.zoo import patterns
from services.zoo.automata import LETTERS, Members, compiled
from services.zoo.dataset import read_about
from services.zoo.patterns import Pattern, from_specs, register
from services.zoo.sampling import count, sample
from services.zoo.universe import Universe

V, LENGTH = 4, 5
EVERY = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
WORDS = ["".join(LETTERS[letter] for letter in row) for row in EVERY.tolist()]

atoms = st.sampled_from(["A", "B", "C", "D", ".", "[AB]", "[^A]", "[B-D]"])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(lambda a, b: f"{a}{b}", inner, inner),
        st.builds(lambda a, b: f"({a}|{b})", inner, inner),
        st.builds(lambda a, op: f"({a}){op}", inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])),
    ),
    max_leaves=8,
)


@given(expressions)
@settings(max_examples=150, deadline=None)
def test_a_regular_expression_means_what_it_means_in_python(expression: str) -> None:
    expected = [re.fullmatch(expression, word) is not None for word in WORDS]
    automaton = compiled(expression)
    assert automaton.matches(EVERY).tolist() == expected
    assert Members(automaton, V, LENGTH).total == sum(expected)


@given(st.lists(st.tuples(st.sampled_from(["", "^"]), expressions, st.sampled_from(["", "$"])), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_anchors_at_the_ends_and_plain_groups_change_nothing(parts: list[tuple[str, str, str]]) -> None:
    plain = "|".join(f"({inner})" for _, inner, _ in parts)
    anchored = "|".join(f"{start}(?:{inner}){end}" for start, inner, end in parts)
    assert compiled(anchored).matches(EVERY).tolist() == compiled(plain).matches(EVERY).tolist()
    assert compiled(anchored).matches(EVERY).tolist() == [re.fullmatch(anchored, word) is not None for word in WORDS]


def test_draws_from_a_regular_expression_are_uniform_members() -> None:
    pattern = Pattern("mine", regex="(AB|B.)+C?[^A]*")
    members = {tuple(row) for row in EVERY[pattern.matches(EVERY)].tolist()}
    assert count(pattern, V, LENGTH) == len(members) > 50
    drawn = sample(pattern, V, LENGTH, 200 * len(members), torch.Generator().manual_seed(0))
    found, times = torch.unique(drawn, dim=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == members
    assert (times - 200).abs().max() < 6 * 200**0.5


def test_beyond_enumeration_counts_are_exact() -> None:
    pattern = Pattern("mine", regex=".*AB.*")
    v, length = 20, 20
    # Without "AB" in it: f(n) = v f(n - 1) - f(n - 2).
    without = [1, v]
    for _ in range(length - 1):
        without.append(v * without[-1] - without[-2])
    assert count(pattern, v, length) == v**length - without[length]
    assert pattern.matches(sample(pattern, v, length, 500, torch.Generator().manual_seed(1))).all()


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("A(B", "should be )"),
        ("A)", "no opening parenthesis"),
        ("A^B", "'^' at character 2 is allowed at the ends alone: patterns match whole sequences; leave out ^ and $"),
        ("AB$C", "'$' at character 3 is allowed at the ends alone"),
        ("A(B$)", "'$' at character 4 is allowed at the ends alone"),
        ("(^A|B)", "'^' at character 2 is allowed at the ends alone"),
        ("^^A", "'^' at character 2 is allowed at the ends alone"),
        ("^*A", "should be a letter"),
        ("*A", "should be a letter"),
        ("a", "should be a letter"),
        ("[A", "should be a letter"),
        ("[C-A]", "wrong way round"),
        ("A{3,2}", "wrong way round"),
        ("A{x}", "should be a number"),
        ("A{101}", "more than 100"),
        ("A{2", "should be }"),
        (".*A.{12}", "more than 2000 states"),
    ],
)
def test_what_is_no_regular_expression_is_told(expression: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)) as caught:
        from_specs([PatternSpec(name="mine", regex=expression)], 7, 7)
    assert caught.value.violations[0].field == "spec.patterns.0.regex"


def test_a_letter_that_the_vocabulary_lacks() -> None:
    with pytest.raises(InvalidInput, match="letters are A to E") as caught:
        from_specs([PatternSpec(name="mine", regex="A.*F")], 5, 5)
    assert caught.value.violations[0].field == "spec.patterns.0.regex"


def test_the_same_set_by_another_name_is_found() -> None:
    specs = [PatternSpec(name="starts_with", token="A"), PatternSpec(name="mine", regex="A.*")]
    with pytest.raises(InvalidInput, match="same set"):
        Universe(5, 5, from_specs(specs, 5, 5)).check()


@pytest.fixture
def two_bs() -> Iterator[Pattern]:
    @register("two_bs", "B occurs exactly twice")
    def predicate(sequences: Tensor) -> Tensor:
        return (sequences == 1).sum(1) == 2

    (pattern,) = from_specs([PatternSpec(name="two_bs")], V, LENGTH)
    yield pattern
    del patterns._REGISTERED["two_bs"]
    REGISTERED.discard("two_bs")


def test_a_predicate_in_python(two_bs: Pattern) -> None:
    expected = torch.tensor([word.count("B") == 2 for word in WORDS])
    assert two_bs.description == "B occurs exactly twice"
    assert torch.equal(two_bs.matches(EVERY), expected)
    assert count(two_bs, V, LENGTH) == int(expected.sum())
    drawn = sample(two_bs, V, LENGTH, 2000, torch.Generator().manual_seed(0))
    assert two_bs.matches(drawn).all()
    assert len(torch.unique(drawn, dim=0)) == int(expected.sum())
    # Too many sequences to look at them all.
    assert two_bs.matches(sample(two_bs, 12, 12, 100, torch.Generator().manual_seed(0))).all()
    exact = 66 * 11**10
    assert abs(count(two_bs, 12, 12) / exact - 1) < 0.02


def test_a_zoo_of_a_predicate_that_is_not_registered_says_which(tmp_path: Path) -> None:
    spec = GenerationSpec().model_dump() | {"patterns": [{"name": "two_ds"}]}
    (tmp_path / "zoo.json").write_text(json.dumps({"format": 2, "spec": spec}))
    with pytest.raises(InvalidInput, match=r"no pattern two_ds.*entry point of the group ethogram\.patterns.*register"):
        read_about(tmp_path)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "none_such"}, "name"),
        ({"name": "palindrome", "regex": "A.*"}, "name"),
        ({"name": "Mine", "regex": "A.*"}, "name"),
        ({"name": "mine", "regex": ""}, "regex"),
    ],
)
def test_a_name_that_stands_for_nothing(fields: dict[str, str], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        PatternSpec.model_validate(fields)
    assert caught.value.errors()[0]["loc"] == (field,)


def test_a_predicate_that_answers_something_else() -> None:
    register("wrong", "wrong")(lambda sequences: sequences.sum(1))
    try:
        with pytest.raises(InvalidInput, match="bool tensor"):
            Pattern("wrong").matches(EVERY)
    finally:
        del patterns._REGISTERED["wrong"]
        REGISTERED.discard("wrong")


def test_a_package_brings_a_predicate(tmp_path: Path) -> None:
    info = tmp_path / "mine-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ethogram.patterns]\nno_b = mine:no_b\n")
    (tmp_path / "mine.py").write_text('def no_b(s):\n    """B does not\n    occur"""\n    return (s != 1).all(1)\n')
    code = (
        "import torch\nfrom ethogram.specs.generation import PatternSpec\n"
        "from services.zoo.patterns import from_specs\n"
        "(p,) = from_specs([PatternSpec(name='no_b')], 5, 4)\n"
        "print(p.description, p.matches(torch.tensor([[0, 2, 0, 0], [0, 1, 0, 0]])).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "B does not occur [True, False]\n", done.stderr


def test_code_of_the_users_that_fails_is_named_with_its_line() -> None:
    register("fails", "fails")(lambda sequences: sequences[:, 99] == 1)
    try:
        with pytest.raises(InvalidInput, match=r"^patterns\.fails: its predicate failed: IndexError: .*patterns\.py"):
            Pattern("fails").matches(EVERY)
    finally:
        del patterns._REGISTERED["fails"]
        REGISTERED.discard("fails")


@pytest.mark.parametrize("code", ["import surely_not_installed", "1 / 0", "x = ", "def other(): pass"])
def test_an_entry_point_that_cannot_be_loaded_is_named(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ethogram.patterns]\nbroken_b = broken_b:broken_b\n")
    (tmp_path / "broken_b.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InvalidInput, match=r"^patterns\.broken_b: the entry point broken_b:broken_b cannot be loaded: "
    ):
        Pattern("broken_b").matches(EVERY)


@pytest.mark.parametrize("expression", ["((A?){100}){100}", "(A{0,100}){0,100}", "((.{100}){100}){100}", "A{100}" * 6])
def test_repeats_that_would_take_for_ever_are_told(expression: str) -> None:
    with pytest.raises(InvalidInput, match="with its repeats written out"):
        compiled(expression)


@pytest.fixture
def usual_recursion() -> Iterator[None]:
    """The limit of a new process, which a compiler of another test may have raised."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("usual_recursion")
@pytest.mark.parametrize("expression", ["A" * 499, "(" * 249 + "A" + ")" * 249, "(" * 500, "A?" * 250])
def test_an_expression_that_is_nested_too_deeply_is_an_error_of_its_field(expression: str) -> None:
    with pytest.raises(InvalidInput, match="too long or nested too deeply") as caught:
        from_specs([PatternSpec(name="mine", regex=expression)], 7, 7)
    assert caught.value.violations[0].field == "spec.patterns.0.regex"


@pytest.fixture
def estimated() -> Iterator[None]:
    """Predicates whose sets are too large to be counted, one of them under two names."""
    for name in ("mine", "yours"):
        register(name, "no letter but the last is above M")(lambda sequences: (sequences[:, :-1] <= 12).all(1))
    register("rare", "AA, then not far")(lambda sequences: (sequences[:, :2] == 0).all(1) & (sequences[:, 2] < 12))
    yield
    for name in ("mine", "yours", "rare"):
        patterns._REGISTERED.pop(name)
        REGISTERED.discard(name)


@pytest.mark.usefixtures("estimated")
def test_one_predicate_under_two_names_is_told_where_it_cannot_be_counted() -> None:
    own = [Pattern("mine"), Pattern("yours"), Pattern("palindrome")]
    with pytest.raises(InvalidInput, match="are the same set"):
        Universe(26, 5, own).check()
    Universe(26, 5, own[1:]).check()


@pytest.mark.usefixtures("estimated")
@pytest.mark.slow
@pytest.mark.timeout(60)
def test_all_members_of_a_set_of_unknown_size() -> None:
    universe = Universe(26, 5, [Pattern("rare")])
    assert universe.counts[0] > 0
    found = universe.all_members(0)
    assert 0.99 * 12 * 26**2 < len(found) <= 12 * 26**2 and (found[:, :2] == 0).all()

"""The behaviours: exact predicates over letter sequences.

A sequence is a row of letter indices (A = 0). Each pattern is one set of sequences, parameters included; the tests
enumerate whole universes and check that no two are equal.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

import torch
from torch import Tensor

from ethogram.errors import EthogramError, InvalidInput
from ethogram.specs.generation import BUILT_IN, ENTRY_POINTS, REGISTERED, PatternSpec
from services.zoo.automata import LETTERS, Automaton, compiled

Predicate = Callable[[Tensor], Tensor]
TAKES_TOKEN = frozenset({"starts_with", "ends_with"})
_REGEX = {"contains_abc": ".*ABC.*", "vowel_consonant": "[AEIOU]?([^AEIOU][AEIOU])*[^AEIOU]?"}


def _steps(s: Tensor) -> Tensor:
    return s[:, 1:] - s[:, :-1]


def _counts(s: Tensor) -> Tensor:
    """How often the most frequent letter of each row occurs."""
    return (s.unsqueeze(1) == s.unsqueeze(2)).sum(2).amax(1)


def _pairs(s: Tensor) -> Tensor:
    """Second minus first letter of the disjoint pairs (1st, 2nd), (3rd, 4th), ...; an odd last letter is free."""
    even = s.shape[1] // 2 * 2
    return s[:, 1:even:2] - s[:, 0:even:2]


@cache
def _mountain() -> Automaton:
    """States: start, failed, then three for each letter just read: first, on the way up, on the way down."""
    v = len(LETTERS)
    step = [[2 + 3 * letter for letter in range(v)], [1] * v]
    for last in range(v):
        up = [3 + 3 * letter if letter > last else 1 for letter in range(v)]
        down = [4 + 3 * letter if letter < last else 1 for letter in range(v)]
        step += [up, [max(pair) for pair in zip(up, down, strict=True)], down]
    states = torch.arange(len(step))
    return Automaton(torch.tensor(step), (states > 1) & (states % 3 == 1))


_PREDICATES: dict[str, Predicate] = {
    "all_same": lambda s: (s == s[:, :1]).all(1),
    "palindrome": lambda s: (s == s.flip(1)).all(1),
    "sorted_ascending": lambda s: (_steps(s) >= 0).all(1),
    "sorted_descending": lambda s: (_steps(s) <= 0).all(1),
    "alternating": lambda s: (s[:, 2:] == s[:, :-2]).all(1) & (s[:, 0] != s[:, 1]),
    "no_repeats": lambda s: _counts(s) == 1,
    "has_majority": lambda s: _counts(s) * 2 > s.shape[1],
    "increasing_pairs": lambda s: (_pairs(s) > 0).all(1),
    "decreasing_pairs": lambda s: (_pairs(s) < 0).all(1),
    "first_last_match": lambda s: s[:, 0] == s[:, -1],
}


_REGISTERED: dict[str, tuple[Predicate, str]] = {}
"""Predicate and description of each pattern that the user registered."""


def register(name: str, description: str) -> Callable[[Predicate], Predicate]:
    """Register a predicate as a pattern: ``[n, length]`` letter indices to bool ``[n]``.

        @register("two_bs", "B occurs exactly twice")
        def two_bs(sequences):
            return (sequences == 1).sum(1) == 2

    Jobs run in other processes. For them, declare the function as an entry point of the group ``ethogram.patterns``
    in a package that is installed where workers run; its docstring is the description.
    """

    def add(predicate: Predicate) -> Predicate:
        if name in BUILT_IN or not name.isidentifier():
            raise InvalidInput.field("name", f"{name!r} is taken or not an identifier; choose another name")
        _REGISTERED[name] = predicate, description
        REGISTERED.add(name)
        return predicate

    return add


@contextmanager
def _users_code(field: str, what: str) -> Iterator[None]:
    """Whatever code of the user's raises is :class:`InvalidInput`, with its place."""
    try:
        yield
    except EthogramError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{what}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        raise InvalidInput.field(field, text) from error


def registered(name: str) -> tuple[Predicate, str]:
    """Predicate and description of the pattern registered as ``name``. Raises :class:`InvalidInput`."""
    if name not in _REGISTERED:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            with _users_code(f"patterns.{name}", f"the entry point {entry.value} cannot be loaded"):
                predicate = entry.load()
            _REGISTERED[name] = predicate, " ".join((predicate.__doc__ or name).split())
    if name not in _REGISTERED:
        raise InvalidInput.field("name", f"there is no pattern {name}; give it a regex, or register it")
    return _REGISTERED[name]


@dataclass(frozen=True)
class Pattern:
    """One behaviour."""

    kind: str
    """Which predicate, e.g. ``starts_with``."""
    token: int | None = None
    """Letter index of ``starts_with`` and ``ends_with``."""
    regex: str | None = None
    """Regular expression of a pattern that the user defined."""

    @property
    def name(self) -> str:
        """Unique among a zoo's patterns, e.g. ``starts_with(A)``."""
        return self.kind if self.token is None else f"{self.kind}({LETTERS[self.token]})"

    @property
    def spec(self) -> PatternSpec:
        """The pattern as an entry of a spec; the inverse of :func:`from_specs`."""
        return PatternSpec(name=self.kind, token=None if self.token is None else LETTERS[self.token], regex=self.regex)

    @property
    def regular(self) -> bool:
        """Whether the set can be counted exactly at any size; a registered predicate's may be estimated."""
        return self.regex is not None or self.kind in BUILT_IN

    @property
    def automaton(self) -> Automaton | None:
        """The automaton that accepts the set; None of a pattern that is tested, counted and drawn without one."""
        regex = self.regex or _REGEX.get(self.kind)
        if regex is not None:
            return compiled(regex)
        return _mountain() if self.kind == "mountain_pattern" else None

    @property
    def description(self) -> str:
        """A clause that describes the pattern to people."""
        if self.regex is not None:
            return f"the whole sequence matches the regular expression {self.regex}"
        if self.kind not in BUILT_IN:
            return registered(self.kind)[1]
        return BUILT_IN[self.kind].format("" if self.token is None else LETTERS[self.token])

    def matches(self, sequences: Tensor) -> Tensor:
        """Whether each row of ``sequences`` has it: ``[n, length]`` letter indices (length >= 3) to bool ``[n]``."""
        if self.token is not None:
            return sequences[:, 0 if self.kind == "starts_with" else -1].eq(self.token)
        if (automaton := self.automaton) is not None:
            return automaton.matches(sequences)
        if self.kind in _PREDICATES:
            return _PREDICATES[self.kind](sequences)
        predicate = registered(self.kind)[0]
        with _users_code(f"patterns.{self.kind}", "its predicate failed"):
            matches = predicate(sequences)
        if not isinstance(matches, Tensor) or matches.dtype != torch.bool or matches.shape != sequences.shape[:1]:
            raise InvalidInput.field(f"patterns.{self.kind}", "its predicate must return a bool tensor of shape [n]")
        return matches


def membership(patterns: Sequence[Pattern], sequences: Tensor) -> Tensor:
    """Which patterns each sequence ``[n, length]`` matches: bool ``[n, patterns]``."""
    return torch.stack([pattern.matches(sequences) for pattern in patterns], 1)


def built_in(vocab_size: int) -> list[Pattern]:
    """Every built-in pattern, those with a token once for each letter."""
    letters: list[int | None] = list(range(vocab_size))
    return [Pattern(kind, token) for kind in BUILT_IN for token in (letters if kind in TAKES_TOKEN else [None])]


def default_suite(vocab_size: int = 7, length: int = 7) -> list[Pattern]:
    """Ten behaviours that differ in what a network must look at: positions, order, counts, symmetry, substrings."""
    # Left out: alternating (42 sequences at 7 x 7, too few to learn from and be judged on), no_repeats
    # (beyond 16 neurons), first_last_match (contains palindrome).
    kinds = ("palindrome", "sorted_ascending", "sorted_descending", "contains_abc", "has_majority", "vowel_consonant")
    # Strict mountains are few, then none, where sequences are long for the alphabet.
    more = ("increasing_pairs", "mountain_pattern" if length <= 2 * vocab_size - 3 else "first_last_match")
    return [*map(Pattern, kinds), Pattern("starts_with", 0), Pattern("ends_with", 2), *map(Pattern, more)]


def from_specs(
    specs: Sequence[PatternSpec], vocab_size: int, length: int, field: str = "spec.patterns"
) -> list[Pattern]:
    """The patterns that a spec names; none: :func:`default_suite`. Raises :class:`InvalidInput` naming the entry."""
    if not specs:
        return default_suite(vocab_size, length)
    patterns: list[Pattern] = []
    for i, spec in enumerate(specs):
        try:
            pattern = _from_spec(spec, vocab_size)
        except InvalidInput as error:
            (violation,) = error.violations
            raise InvalidInput.field(f"{field}.{i}.{violation.field}", violation.description) from None
        if pattern.name in [other.name for other in patterns]:
            raise InvalidInput.field(f"{field}.{i}", f"{pattern.name} is listed twice")
        patterns.append(pattern)
    return patterns


def _from_spec(spec: PatternSpec, vocab_size: int) -> Pattern:
    alphabet = f"with vocab_size {vocab_size} the letters are A to {LETTERS[vocab_size - 1]}"
    if (spec.token is not None) != (spec.name in TAKES_TOKEN):
        needs = "needs a token, e.g. A" if spec.name in TAKES_TOKEN else "takes no token"
        raise InvalidInput.field("token", f"{spec.name} {needs}")
    if spec.token is not None and spec.token in LETTERS[vocab_size:]:
        raise InvalidInput.field("token", alphabet)
    if spec.regex is not None:
        compiled(spec.regex)
        if beyond := {letter for letter in spec.regex if letter in LETTERS[vocab_size:]}:
            raise InvalidInput.field("regex", f"{min(beyond)}: {alphabet}")
    elif spec.name not in BUILT_IN:
        registered(spec.name)
    return Pattern(spec.name, None if spec.token is None else LETTERS.index(spec.token), spec.regex)

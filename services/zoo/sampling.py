"""Uniform draws from a pattern's set, and its exact size, at any vocabulary and length: no enumeration."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.runtime import seeds
from services.zoo.automata import Members
from services.zoo.patterns import Pattern

MAX_ENUMERATED = 5_000_000
# Sequences per draw of rejection sampling, and in all.
_DRAWS = 2**17
_MAX_DRAWS = 2**27


def count(pattern: Pattern, vocab_size: int, length: int) -> int:
    """Number of sequences that match; an estimate for a registered predicate where there are too many to enumerate."""
    v, n = vocab_size, length
    match pattern.kind:
        case "all_same":
            return v
        case "palindrome":
            return int(v ** ((n + 1) // 2))
        case "sorted_ascending" | "sorted_descending":
            return math.comb(v + n - 1, n)
        case "alternating":
            return v * (v - 1)
        case "starts_with" | "ends_with" | "first_last_match":
            return int(v ** (n - 1))
        case "no_repeats":
            return math.perm(v, n)
        case "has_majority":
            return v * sum(_majority_weights(v, n))
        case "increasing_pairs" | "decreasing_pairs":
            return int(math.comb(v, 2) ** (n // 2) * v ** (n % 2))
    members = _members(pattern, v, n)
    return members.total if members is not None else _enumerated(pattern, v, n)[1]


def sample(pattern: Pattern, vocab_size: int, length: int, n: int, generator: torch.Generator) -> Tensor:
    """``n`` independent uniform members: int64 ``[n, length]``. The set must not be empty."""
    v = vocab_size

    def letters(*shape: int, below: int = v) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    match pattern.kind:
        case "all_same":
            return letters(n, 1).repeat(1, length)
        case "palindrome":
            half = letters(n, (length + 1) // 2)
            return torch.cat([half, half[:, : length // 2].flip(1)], 1)
        case "sorted_ascending":
            return _multisets(v, length, n, generator)
        case "sorted_descending":
            return _multisets(v, length, n, generator).flip(1)
        case "alternating":
            first = letters(n, 1)
            second = (first + 1 + letters(n, 1, below=v - 1)) % v
            return torch.cat([first, second], 1).repeat(1, (length + 1) // 2)[:, :length]
        case "starts_with" | "ends_with":
            sequences = letters(n, length)
            assert pattern.token is not None
            sequences[:, 0 if pattern.kind == "starts_with" else -1] = pattern.token
            return sequences
        case "first_last_match":
            sequences = letters(n, length)
            sequences[:, -1] = sequences[:, 0]
            return sequences
        case "no_repeats":
            return torch.rand(n, v, generator=generator).argsort(1)[:, :length]
        case "has_majority":
            weights = torch.tensor([float(weight) for weight in _majority_weights(v, length)], dtype=torch.float64)
            times = length // 2 + 1 + torch.multinomial(weights, n, replacement=True, generator=generator).unsqueeze(1)
            major = letters(n, 1)
            others = (major + 1 + letters(n, length, below=v - 1)) % v
            here = torch.rand(n, length, generator=generator).argsort(1).argsort(1) < times
            return torch.where(here, major, others)
        case "increasing_pairs" | "decreasing_pairs":
            pairs = torch.combinations(torch.arange(v))[letters(n, length // 2, below=math.comb(v, 2))]
            pairs = pairs if pattern.kind == "increasing_pairs" else pairs.flip(2)
            return torch.cat([pairs.flatten(1), letters(n, length % 2)], 1)
    if (members := _members(pattern, v, length)) is not None:
        return members.sample(n, generator)
    return _sample_by_rejection(pattern, v, length, n, generator)


def _multisets(v: int, length: int, n: int, generator: torch.Generator) -> Tensor:
    """Uniform non-decreasing rows, by stars and bars: a ``length``-subset of ``v + length - 1`` positions."""
    subsets = torch.rand(n, v + length - 1, generator=generator).argsort(1)[:, :length].sort(1).values
    return subsets - torch.arange(length)


def _majority_weights(v: int, n: int) -> list[int]:
    """Sequences in which one given letter occurs k times, for each k above n / 2."""
    return [math.comb(n, k) * (v - 1) ** (n - k) for k in range(n // 2 + 1, n + 1)]


@lru_cache(maxsize=256)
def _members(pattern: Pattern, v: int, length: int) -> Members | None:
    automaton = pattern.automaton
    return None if automaton is None else Members(automaton, v, length)


def enumerate_sequences(v: int, length: int, start: int = 0, stop: int | None = None) -> Tensor:
    """The sequences from ``start`` to before ``stop`` (by default all) in alphabetical order: int64 ``[n, length]``."""
    codes = torch.arange(start, v**length if stop is None else min(stop, v**length))
    return codes.unsqueeze(1) // v ** torch.arange(length - 1, -1, -1) % v


@lru_cache(maxsize=64)
def _enumerated(pattern: Pattern, v: int, length: int) -> tuple[Tensor | None, int]:
    """Members of a registered predicate's set, None where there are too many sequences to enumerate, and their
    number."""
    size = v**length
    if size <= MAX_ENUMERATED:
        chunks = (enumerate_sequences(v, length, start, start + 2**16) for start in range(0, size, 2**16))
        members = torch.cat([chunk[pattern.matches(chunk)] for chunk in chunks])
        return members, len(members)
    drawn = torch.randint(v, (_DRAWS, length), generator=seeds.generator(0, "share", pattern.name))
    return None, round(float(pattern.matches(drawn).double().mean()) * size)


def _sample_by_rejection(pattern: Pattern, v: int, length: int, n: int, generator: torch.Generator) -> Tensor:
    members, _ = _enumerated(pattern, v, length)
    if members is not None:
        return members[torch.randint(len(members), (n,), generator=generator)]
    members = torch.zeros(0, length, dtype=torch.int64)
    for _ in range(_MAX_DRAWS // _DRAWS):
        if len(members) >= n:
            break
        drawn = torch.randint(v, (_DRAWS, length), generator=generator)
        members = torch.cat([members, drawn[pattern.matches(drawn)]])
    if len(members) < n:
        raise InvalidInput.field(
            "spec.patterns", f"{pattern.name} is too rare to sample at this length; write it as a regex"
        )
    return members[:n]

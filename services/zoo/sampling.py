"""Uniform draws from a pattern's set, and its exact size, at any vocabulary and length: no enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from services.zoo.patterns import VOWELS, Pattern


def count(pattern: Pattern, vocab_size: int, length: int) -> int:
    """Number of sequences that match, exactly."""
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
        case _:
            return _Automaton(*_AUTOMATA[pattern.kind](v), n).total


def sample(pattern: Pattern, vocab_size: int, length: int, n: int, draws: torch.Generator) -> Tensor:
    """``n`` independent uniform members: int64 ``[n, length]``. The set must not be empty."""
    v = vocab_size

    def letters(*shape: int, below: int = v) -> Tensor:
        return torch.randint(below, shape, generator=draws)

    match pattern.kind:
        case "all_same":
            return letters(n, 1).repeat(1, length)
        case "palindrome":
            half = letters(n, (length + 1) // 2)
            return torch.cat([half, half[:, : length // 2].flip(1)], 1)
        case "sorted_ascending":
            return _multisets(v, length, n, draws)
        case "sorted_descending":
            return _multisets(v, length, n, draws).flip(1)
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
            return torch.rand(n, v, generator=draws).argsort(1)[:, :length]
        case "has_majority":
            weights = torch.tensor([float(weight) for weight in _majority_weights(v, length)], dtype=torch.float64)
            times = length // 2 + 1 + torch.multinomial(weights, n, replacement=True, generator=draws).unsqueeze(1)
            major = letters(n, 1)
            others = (major + 1 + letters(n, length, below=v - 1)) % v
            here = torch.rand(n, length, generator=draws).argsort(1).argsort(1) < times
            return torch.where(here, major, others)
        case "increasing_pairs" | "decreasing_pairs":
            pairs = torch.combinations(torch.arange(v))[letters(n, length // 2, below=math.comb(v, 2))]
            pairs = pairs if pattern.kind == "increasing_pairs" else pairs.flip(2)
            return torch.cat([pairs.flatten(1), letters(n, length % 2)], 1)
        case _:
            return _Automaton(*_AUTOMATA[pattern.kind](v), length).sample(n, draws)


def _multisets(v: int, length: int, n: int, draws: torch.Generator) -> Tensor:
    """Uniform non-decreasing rows, by stars and bars: a ``length``-subset of ``v + length - 1`` places."""
    subsets = torch.rand(n, v + length - 1, generator=draws).argsort(1)[:, :length].sort(1).values
    return subsets - torch.arange(length)


def _majority_weights(v: int, n: int) -> list[int]:
    """Sequences in which one given letter occurs k times, for each k above n / 2."""
    return [math.comb(n, k) * (v - 1) ** (n - k) for k in range(n // 2 + 1, n + 1)]


class _Automaton:
    """Members of a regular set, letter by letter, each letter weighted by the number of ways to go on from it."""

    def __init__(self, step: list[list[int]], accepting: set[int], length: int) -> None:
        """``step[state][letter]`` is the next state; state 0 is the start."""
        ways = [[int(state in accepting) for state in range(len(step))]]
        for _ in range(length):
            ways.append([sum(ways[-1][after] for after in row) for row in step])
        self.total, self._length = ways[length][0], length
        self._step = torch.tensor(step)
        # Exact integers, made relative only now: a state's letters need no more than their ratios.
        self._weights = torch.tensor(
            [
                [[ways[left][after] / max(ways[left + 1][state], 1) for after in row] for state, row in enumerate(step)]
                for left in reversed(range(length))
            ],
            dtype=torch.float64,
        )

    def sample(self, n: int, draws: torch.Generator) -> Tensor:
        state, columns = torch.zeros(n, dtype=torch.int64), []
        for weights in self._weights:
            letter = torch.multinomial(weights[state], 1, generator=draws).squeeze(1)
            columns.append(letter)
            state = self._step[state, letter]
        return torch.stack(columns, 1)


def _abc(v: int) -> tuple[list[list[int]], set[int]]:
    """States: how much of A, B, C has just been read; 3 is for good."""
    step = [[1 if letter == 0 else 0 for letter in range(v)] for _ in range(3)] + [[3] * v]
    step[1][1], step[2][2] = 2, 3
    return step, {3}


def _vowels(v: int) -> tuple[list[list[int]], set[int]]:
    """States: start, after a vowel, after a consonant, failed."""
    kinds = [1 if letter in VOWELS else 2 for letter in range(v)]
    return [kinds, [2 if kind == 2 else 3 for kind in kinds], [1 if kind == 1 else 3 for kind in kinds], [3] * v], {
        1,
        2,
    }


def _mountain(v: int) -> tuple[list[list[int]], set[int]]:
    """States: start, failed, then three for each letter just read: first, on the way up, on the way down."""
    step = [[2 + 3 * letter for letter in range(v)], [1] * v]
    for here in range(v):
        up = [3 + 3 * letter if letter > here else 1 for letter in range(v)]
        down = [4 + 3 * letter if letter < here else 1 for letter in range(v)]
        step += [up, [max(pair) for pair in zip(up, down, strict=True)], down]
    return step, {4 + 3 * letter for letter in range(v)}


_AUTOMATA: dict[str, Callable[[int], tuple[list[list[int]], set[int]]]] = {
    "contains_abc": _abc,
    "vowel_consonant": _vowels,
    "mountain_pattern": _mountain,
}

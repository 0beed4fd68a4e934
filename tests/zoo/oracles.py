"""The patterns once more, in plain Python over one sequence."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

from services.zoo.patterns import Pattern

Row = tuple[int, ...]


def _vowel_consonant(row: Row) -> bool:
    kinds = ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[x] in "AEIOU" for x in row]
    return all(a != b for a, b in itertools.pairwise(kinds))


def _mountain(row: Row) -> bool:
    peak = row.index(max(row))
    up, down = row[: peak + 1], row[peak:]
    return (
        0 < peak < len(row) - 1
        and all(a < b for a, b in itertools.pairwise(up))
        and all(a > b for a, b in itertools.pairwise(down))
    )


def _pairs(row: Row) -> list[tuple[int, int]]:
    return [(row[i], row[i + 1]) for i in range(0, len(row) - 1, 2)]


ORACLES: dict[str, Callable[[Row], bool]] = {
    "all_same": lambda row: len(set(row)) == 1,
    "palindrome": lambda row: row == row[::-1],
    "sorted_ascending": lambda row: list(row) == sorted(row),
    "sorted_descending": lambda row: list(row) == sorted(row, reverse=True),
    "alternating": lambda row: len(set(row[::2])) == 1 and len(set(row[1::2])) == 1 and row[0] != row[1],
    "contains_abc": lambda row: "ABC" in "".join(chr(65 + x) for x in row),
    "starts_with": lambda row: row[0] == 0,
    "ends_with": lambda row: row[-1] == 2,
    "no_repeats": lambda row: len(set(row)) == len(row),
    "has_majority": lambda row: max(Counter(row).values()) > len(row) / 2,
    "increasing_pairs": lambda row: all(a < b for a, b in _pairs(row)),
    "decreasing_pairs": lambda row: all(a > b for a, b in _pairs(row)),
    "vowel_consonant": _vowel_consonant,
    "first_last_match": lambda row: row[0] == row[-1],
    "mountain_pattern": _mountain,
}
TOKENS = {"starts_with": 0, "ends_with": 2}
ALL = [Pattern(kind, TOKENS.get(kind)) for kind in ORACLES]


def oracle(pattern: Pattern, row: Row) -> bool:
    """Whether ``row`` matches (tokens as in ``ALL``)."""
    return ORACLES[pattern.kind](row)

"""All sequences of a zoo, split once and for all into train, validation and held-out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.zoo.hashing import hash_sequences
from services.zoo.patterns import Pattern, membership

TRAIN, VALIDATION, HELD_OUT = 0, 1, 2
# Held-out is large so that a pattern of 42 sequences still has 17 to be judged on.
SHARES = (0.5, 0.1, 0.4)
MAX_ENUMERATED = 5_000_000


class Universe:
    """The ``vocab_size ** length`` sequences, with the patterns that organise them."""

    def __init__(self, vocab_size: int, length: int, patterns: Sequence[Pattern]) -> None:
        self.vocab_size, self.length, self.patterns = vocab_size, length, tuple(patterns)
        self.size = vocab_size**length

    @property
    def enumerated(self) -> bool:
        """Whether every sequence fits in memory."""
        return self.size <= MAX_ENUMERATED

    @cached_property
    def sequences(self) -> Tensor:
        """Every sequence ``[size, length]`` (int64), in alphabetical order."""
        return decode(torch.arange(self.size), self.vocab_size, self.length)

    @cached_property
    def membership(self) -> Tensor:
        """Which patterns each sequence matches: bool ``[size, patterns]``."""
        return torch.cat([membership(self.patterns, chunk) for chunk in self.sequences.split(2**18)])

    @cached_property
    def split(self) -> Tensor:
        """``TRAIN``, ``VALIDATION`` or ``HELD_OUT`` of every sequence: uint8 ``[size]``."""
        return split(self.sequences, self.membership)

    def check(self, field: str = "spec.patterns") -> None:
        """Raise :class:`InvalidInput` where a pattern is empty, everything, or the same set as another."""
        counts = self.membership.sum(0).tolist()
        for i, (pattern, count) in enumerate(zip(self.patterns, counts, strict=True)):
            place = f"at vocab_size {self.vocab_size} and sequence_length {self.length}"
            if count == 0:
                raise InvalidInput.field(f"{field}.{i}", f"no sequence matches {pattern.name} {place}; leave it out")
            if count == self.size:
                raise InvalidInput.field(f"{field}.{i}", f"every sequence matches {pattern.name} {place}; leave it out")
            for j in range(i):
                if counts[j] == count and torch.equal(self.membership[:, i], self.membership[:, j]):
                    raise InvalidInput.field(
                        f"{field}.{i}", f"{pattern.name} and {self.patterns[j].name} are the same set {place}; drop one"
                    )


def code(sequences: Tensor, vocab_size: int) -> Tensor:
    """Alphabetical rank of each sequence ``[n, length]`` in its universe (below 2^63): int64 ``[n]``."""
    rank = torch.zeros(len(sequences), dtype=torch.int64)
    for column in sequences.unbind(1):
        rank = rank * vocab_size + column
    return rank


def decode(codes: Tensor, vocab_size: int, length: int) -> Tensor:
    """The inverse of :func:`code`: ``[n]`` to ``[n, length]``."""
    places = vocab_size ** torch.arange(length - 1, -1, -1)
    return codes.unsqueeze(1) // places % vocab_size


def split(sequences: Tensor, matches: Tensor) -> Tensor:
    """Assign each sequence of a universe to a split by the rank of its hash within its stratum.

    The stratum of a sequence is the rarest pattern that it matches (``matches``: bool ``[n, patterns]``), or none, so
    that each split has its share of every pattern, however small.
    """
    rarity = matches.sum(0).argsort()
    stratum = torch.full((len(sequences),), matches.shape[1])
    for pattern in rarity.flip(0):
        stratum[matches[:, pattern]] = pattern
    hashes = hash_sequences(sequences)
    result = torch.empty(len(sequences), dtype=torch.uint8)
    for group in stratum.unique():
        rows = (stratum == group).nonzero().squeeze(1)
        rows = rows[hashes[rows].argsort()]
        first = round(len(rows) * SHARES[TRAIN])
        last = len(rows) - round(len(rows) * SHARES[HELD_OUT])
        result[rows[:first]], result[rows[first:last]], result[rows[last:]] = TRAIN, VALIDATION, HELD_OUT
    return result

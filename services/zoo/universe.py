"""All sequences of a zoo, with their fixed split into train, validation, selection and held-out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, combinations

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.runtime import seeds
from services.zoo.hashing import hash_sequences
from services.zoo.patterns import Pattern, built_in, membership
from services.zoo.sampling import MAX_ENUMERATED, count, enumerate_sequences, sample

# Subjects are accepted on the selection split; what is reported of them is measured on the held-out split.
TRAIN, VALIDATION, SELECTION, HELD_OUT = range(4)
SHARES = (0.5, 0.1, 0.2, 0.2)
_QUICKLY_ENUMERATED = 1_000_000
# Splits and patterns of so few sequences are looked up in tables: drawing from them asks for each many times.
_TABULATED = 2**16
# A built-in pattern with fewer sequences than this is split by rank, so that its shares are exact.
SMALL = 4096
# Members on which two patterns are compared.
_COMPARED = 4096


class Universe:
    """The ``vocab_size ** length`` sequences and the patterns on them.

    ``sequences``, ``membership`` and ``split`` need a universe that fits in memory; everything else works at any size.
    """

    def __init__(self, vocab_size: int, length: int, patterns: Sequence[Pattern]) -> None:
        self.vocab_size, self.length, self.patterns = vocab_size, length, tuple(patterns)
        self.size: int = vocab_size**length
        self.enumerated = self.size <= MAX_ENUMERATED
        """Whether the universe is small enough to enumerate."""

    def __getstate__(self) -> dict[str, object]:
        # Not the large tensors, which are made anew where they are needed.
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}

    @cached_property
    def sequences(self) -> Tensor:
        """Every sequence in alphabetical order: int64 ``[size, length]``."""
        assert self.enumerated
        return enumerate_sequences(self.vocab_size, self.length)

    @cached_property
    def membership(self) -> Tensor:
        """Which patterns each sequence matches: bool ``[size, patterns]``."""
        return self._matches(self.sequences)

    @cached_property
    def split(self) -> Tensor:
        """``TRAIN``, ``VALIDATION``, ``SELECTION`` or ``HELD_OUT`` of every sequence: uint8 ``[size]``."""
        return self._split_of(self.sequences)

    @cached_property
    def counts(self) -> list[int]:
        """Number of sequences of each pattern."""
        return [count(pattern, self.vocab_size, self.length) for pattern in self.patterns]

    def exact(self, pattern: int) -> bool:
        """Whether the size of a pattern's set is known, not estimated."""
        return self.enumerated or self.patterns[pattern].regular

    def matches(self, sequences: Tensor) -> Tensor:
        """Which patterns each sequence ``[n, length]`` matches: bool ``[n, patterns]``."""
        return self.membership[self._rank(sequences)] if self.size <= _TABULATED else self._matches(sequences)

    def _matches(self, sequences: Tensor) -> Tensor:
        # Letters fit a byte; chunks stay in the cache.
        chunks = torch.split(sequences.to(torch.int8), 2**14)
        return torch.cat([membership(self.patterns, chunk) for chunk in chunks])

    def members(self, pattern: int, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent uniform members of a pattern: int64 ``[n, length]``."""
        return sample(self.patterns[pattern], self.vocab_size, self.length, n, generator)

    def all_members(self, pattern: int) -> Tensor:
        """Every member of a small pattern: int64 ``[count, length]``, in the order of their hashes."""
        if self.size <= _QUICKLY_ENUMERATED:
            members = self.sequences[self.membership[:, pattern]]
        else:
            # Draw until all were seen. A set of n takes about n ln n draws; the size may be estimated.
            generator, size = seeds.generator(0, "members", self.patterns[pattern].name), self.counts[pattern]
            members, before = self.members(pattern, 0, generator), -1
            while len(members) < size if self.exact(pattern) else len(members) > before:
                before = len(members)
                members = distinct(torch.cat([members, self.members(pattern, 4 * size, generator)]))
        return members[hash_sequences(members).argsort()]

    def split_of(self, sequences: Tensor) -> Tensor:
        """The split of each sequence ``[n, length]``: uint8 ``[n]``. It depends on the sequence, the vocabulary and the
        length alone: not on :attr:`patterns`.

        The members of small built-in patterns are ranked, so that each split has its share of every such pattern,
        however small; all other sequences are split by their hash.
        """
        return self.split[self._rank(sequences)] if self.size <= _TABULATED else self._split_of(sequences)

    def _rank(self, sequences: Tensor) -> Tensor:
        """Where each sequence ``[n, length]`` is in :attr:`sequences`: int64 ``[n]``."""
        return sequences @ self.vocab_size ** torch.arange(self.length - 1, -1, -1)

    def _split_of(self, sequences: Tensor) -> Tensor:
        hashes = hash_sequences(sequences)
        # 24 bits of the hash as a fraction.
        fraction = ((hashes >> 40) & (2**24 - 1)).double() / 2**24
        splits = _by_fraction(fraction)
        known, ranked = _ranked(self.vocab_size, self.length)
        if len(known):
            index = torch.searchsorted(known, hashes).clamp_(max=len(known) - 1)
            splits = torch.where(known[index] == hashes, ranked[index], splits)
        return splits

    def check(self) -> None:
        """Raise :class:`InvalidInput` where a pattern matches nothing, everything, or the same set as another."""
        here = f"at vocab_size {self.vocab_size} and sequence_length {self.length}"
        for i, (pattern, size) in enumerate(zip(self.patterns, self.counts, strict=True)):
            if size in (0, self.size):
                text = f"{'every' if size else 'no'} sequence matches {pattern.name} {here}; leave it out"
                raise InvalidInput.field(f"spec.patterns.{i}", text)
        for j, i in combinations(range(len(self.patterns)), 2):
            possible = self.counts[i] == self.counts[j] or not (self.exact(i) and self.exact(j))
            if possible and self._same_set(i, j):
                names = f"{self.patterns[i].name} and {self.patterns[j].name}"
                raise InvalidInput.field(f"spec.patterns.{i}", f"{names} are the same set {here}; drop one")

    def _same_set(self, i: int, j: int) -> bool:
        """Whether two patterns are the same set: exact where the universe is enumerated, else by sampled members."""
        generator = seeds.generator(0, "equality")
        for a, b in ((i, j), (j, i)):
            if not self.patterns[b].matches(self.members(a, _COMPARED, generator)).all():
                return False
        return not self.enumerated or torch.equal(self.membership[:, i], self.membership[:, j])


def distinct(sequences: Tensor) -> Tensor:
    """``sequences`` ``[n, length]`` without repeats, in the order of their hashes."""
    return sequences[first_occurrences(sequences)]


def first_occurrences(sequences: Tensor) -> Tensor:
    """Where each distinct row of ``sequences`` ``[n, length]`` occurs first, in the order of their hashes: int64."""
    hashes, order = hash_sequences(sequences).sort(stable=True)
    fresh = torch.ones(len(hashes), dtype=torch.bool)
    fresh[1:] = hashes[1:] != hashes[:-1]
    return order[fresh]


@lru_cache(maxsize=32)
def _ranked(vocab_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Hashes of the members of small built-in patterns, ascending, and their splits.

    The rarest pattern comes first, and each pattern ranks those that no rarer one has ranked by their hash. A new
    built-in pattern changes the split of its members, so zoos must then be made again.
    """
    sizes = {pattern: count(pattern, vocab_size, length) for pattern in built_in(vocab_size)}
    small = sorted((p for p, size in sizes.items() if 0 < size < SMALL), key=lambda p: (sizes[p], p.name))
    universe = Universe(vocab_size, length, small)
    hashes, splits = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    for i in range(len(small)):
        fresh = hash_sequences(universe.all_members(i))
        fresh = fresh[~torch.isin(fresh, hashes)]
        hashes = torch.cat([hashes, fresh])
        splits = torch.cat([splits, _by_fraction((torch.arange(len(fresh)) + 0.5) / max(len(fresh), 1))])
    order = hashes.argsort()
    return hashes[order], splits[order]


def _by_fraction(fraction: Tensor) -> Tensor:
    """Fractions in [0, 1) to splits."""
    edges = torch.tensor(list(accumulate(SHARES[:-1])), dtype=torch.float64)
    return torch.bucketize(fraction.double(), edges, right=True).to(torch.uint8)

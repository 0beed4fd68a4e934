"""Pools of sequences to draw from: members of each pattern, sequences that match nothing, and near misses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from services.runtime.seeds import generator
from services.zoo.universe import HELD_OUT, TRAIN, VALIDATION, Universe, code


@dataclass(frozen=True)
class Pools:
    """Distinct sequences of one split, grouped. With P patterns there are 2P + 1 groups, contiguous in ``sequences``:

    - group p < P: sequences that match pattern p;
    - group P: sequences that match no pattern;
    - group P + 1 + p: near misses of p: one letter away from a sequence that matches p, not matching it themselves
      (they may match other patterns).

    A sequence can be in several groups. Within a group all that qualify were equally likely to be taken.
    """

    sequences: Tensor
    """int64 ``[rows, length]``."""
    membership: Tensor
    """Which patterns each row matches: bool ``[rows, patterns]``."""
    start: Tensor
    """First row of each group: int64 ``[groups]``."""
    count: Tensor
    """Rows of each group: int64 ``[groups]``."""

    @classmethod
    def build(cls, universe: Universe, split: int = TRAIN, limit: int = 8192, seed: int = 0) -> Pools:
        """Draw up to ``limit`` rows for each group from one split (4 x ``limit`` for the group that matches nothing)."""
        draws, patterns = generator(seed, "pools", split), len(universe.patterns)
        inside = universe.split == split
        groups = []
        for p in range(patterns):
            groups.append(_take((universe.membership[:, p] & inside).nonzero().squeeze(1), limit, draws))
        groups.append(_take((~universe.membership.any(1) & inside).nonzero().squeeze(1), 4 * limit, draws))
        for p in range(patterns):
            near = code(_mutate(universe.sequences[groups[p]], universe.vocab_size), universe.vocab_size).unique()
            near = near[~universe.membership[near, p] & inside[near]]
            groups.append(_take(near, limit, draws))
        rows = torch.cat(groups)
        count = torch.tensor([len(group) for group in groups])
        return cls(universe.sequences[rows], universe.membership[rows], count.cumsum(0) - count, count)

    def labels(self, rows: Tensor, selected: Tensor) -> Tensor:
        """Exact labels: whether any selected pattern matches.

        ``rows``: int64 ``[models, n]`` or ``[n]``; ``selected``: bool ``[models, patterns]``. Returns bool
        ``[models, n]``.
        """
        return (self.bits.take(rows) & bits(selected).unsqueeze(1)) != 0

    @cached_property
    def bits(self) -> Tensor:
        """``membership`` as bit masks: int64 ``[rows]``."""
        return bits(self.membership)


@dataclass(frozen=True)
class Evaluation:
    """Held-out sequences to judge networks on, by stratum: one for each pattern, then those that match none."""

    sequences: Tensor
    """int64 ``[n, length]``, stratum after stratum."""
    membership: Tensor
    """bool ``[n, patterns]``."""
    stratum: Tensor
    """int64 ``[n]``: the pattern that the row stands for, or ``patterns`` for none."""

    @classmethod
    def build(
        cls, universe: Universe, per_pattern: int = 64, none: int = 192, split: int = HELD_OUT, seed: int = 0
    ) -> Evaluation:
        """``per_pattern`` sequences for each pattern (all there are, if fewer) and ``none`` that match nothing."""
        patterns = len(universe.patterns)
        pools = Pools.build(universe, split, max(per_pattern, none), seed)
        wanted = torch.tensor([per_pattern] * patterns + [none]).minimum(pools.count[: patterns + 1])
        rows = torch.cat([torch.arange(n) + s for s, n in zip(pools.start, wanted, strict=False)])
        stratum = torch.arange(patterns + 1).repeat_interleave(wanted)
        return cls(pools.sequences[rows], pools.membership[rows], stratum)

    def labels(self, selected: Tensor) -> Tensor:
        """Exact labels ``[models, n]`` under ``selected``, bool ``[models, patterns]``."""
        return (self.membership.float() @ selected.float().T > 0).T

    def by_stratum(self, correct: Tensor) -> Tensor:
        """Means of ``correct`` ``[models, n]`` over each stratum: float32 ``[models, patterns + 1]``."""
        strata = torch.nn.functional.one_hot(self.stratum, self.membership.shape[1] + 1).float()
        return correct.float() @ (strata / strata.sum(0).clamp(min=1))


def probes(universe: Universe, count: int, seed: int = 0) -> Tensor:
    """``count`` sequences ``[count, length]`` of the validation split, the patterns and "matches none" in turn.

    They are neither trained on nor judged on. Distinct as far as the split has enough.
    """
    pools = Pools.build(universe, VALIDATION, count, seed)
    groups = len(universe.patterns) + 1
    order = torch.cat(
        [
            torch.stack([torch.arange(n) * groups + g, torch.arange(s, s + n)], 1)
            for g, (s, n) in enumerate(zip(pools.start[:groups].tolist(), pools.count[:groups].tolist(), strict=True))
        ]
    )
    rows = pools.sequences[order[order[:, 0].argsort(), 1]]
    ranks = code(rows, universe.vocab_size)
    fresh = ~torch.tril(ranks.unsqueeze(0) == ranks.unsqueeze(1), -1).any(1)
    chosen = torch.cat([rows[fresh], rows[~fresh]])[:count]
    return chosen.repeat(-(-count // len(chosen)), 1)[:count]


def bits(flags: Tensor) -> Tensor:
    """Rows of at most 62 flags, bool ``[n, flags]``, as bit masks: int64 ``[n]``."""
    return (flags * (1 << torch.arange(flags.shape[1]))).sum(1)


def _take(rows: Tensor, limit: int, draws: torch.Generator) -> Tensor:
    """Up to ``limit`` of ``rows``, without replacement."""
    return rows[torch.randperm(len(rows), generator=draws)[:limit]]


def _mutate(sequences: Tensor, vocab_size: int) -> Tensor:
    """Every sequence that differs from one of ``sequences`` ``[n, length]`` in exactly one letter (with repeats)."""
    length = sequences.shape[1]
    shifts = torch.arange(1, vocab_size)
    mutants = sequences.repeat(length, len(shifts), 1, 1)
    for position in range(length):
        column = mutants[position, :, :, position]
        mutants[position, :, :, position] = (column + shifts.unsqueeze(1)) % vocab_size
    return mutants.reshape(-1, length)

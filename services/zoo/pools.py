"""Pools of sequences to draw from: members of each pattern, sequences that match nothing, and near misses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from services.runtime import seeds
from services.zoo.hashing import hash_sequences
from services.zoo.subjects import Params, forward
from services.zoo.universe import HELD_OUT, TRAIN, VALIDATION, Universe, distinct, first_occurrences

# A pattern with at most this many times the requested number is listed in full, so that no member is missed.
_ALL_IF_BELOW = 4
# Sequences for the evaluation of a subject: of each pattern, and of none.
JUDGED, JUDGED_NONE = 128, 256


@dataclass(frozen=True)
class Pools:
    """Distinct sequences of one split, grouped. With P patterns there are 2P + 1 groups, contiguous in ``sequences``:

    - group p < P: sequences that match pattern p (built ``rarest_first``: those that match no rarer pattern);
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
    def build(
        cls, universe: Universe, split: int = TRAIN, limit: int = 8192, seed: int = 0, *, rarest_first: bool = False
    ) -> Pools:
        """Draw up to ``limit`` rows for each group (4 x ``limit`` that match nothing) from one split.

        ``rarest_first``: a sequence that matches several patterns is a member of the rarest alone, unless a pattern had
        no members then.
        """
        generator, patterns = seeds.generator(seed, "pools", split), range(len(universe.patterns))

        def in_split(sequences: Tensor) -> Tensor:
            return sequences[universe.split_of(sequences) == split]

        def members(p: int) -> Tensor:
            rarer = [other for other in patterns if (universe.counts[other], other) < (universe.counts[p], p)]

            def of_no_rarer(sequences: Tensor) -> Tensor:
                return sequences[~universe.matches(sequences)[:, rarer].any(1)] if rarest_first and rarer else sequences

            if universe.counts[p] <= _ALL_IF_BELOW * limit:
                every_member = in_split(universe.all_members(p))
                chosen = of_no_rarer(every_member)
                return _take(chosen if len(chosen) else every_member, limit, generator)

            def draw(n: int) -> Tensor:
                return in_split(universe.members(p, n, generator))

            chosen = _gather(lambda n: of_no_rarer(draw(n)), limit, generator)
            return chosen if len(chosen) else _gather(draw, limit, generator)

        def nothing(n: int) -> Tensor:
            sequences = in_split(torch.randint(universe.vocab_size, (n, universe.length), generator=generator))
            return sequences[~universe.matches(sequences).any(1)]

        def near_misses(p: int, members: Tensor) -> Tensor:
            mutants = distinct(in_split(_mutate(members, universe.vocab_size, 8 * limit, generator)))
            return _take(mutants[~universe.patterns[p].matches(mutants)], limit, generator)

        groups = [members(p) for p in patterns]
        groups.append(_gather(nothing, 4 * limit, generator))
        groups += [near_misses(p, groups[p]) for p in patterns]
        sequences, count = torch.cat(groups), torch.tensor([len(group) for group in groups])
        return cls(sequences, universe.matches(sequences), count.cumsum(0) - count, count)

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
    """Sequences of one split to evaluate networks on, by stratum: one for each pattern, then one of no pattern."""

    sequences: Tensor
    """int64 ``[n, length]``, stratum after stratum."""
    membership: Tensor
    """bool ``[n, patterns]``."""
    stratum: Tensor
    """int64 ``[n]``: the pattern of the row's stratum, or ``patterns`` for none."""

    @classmethod
    def build(
        cls,
        universe: Universe,
        per_pattern: int = 64,
        none: int = 192,
        split: int = HELD_OUT,
        seed: int = 0,
        *,
        without: Tensor | None = None,
    ) -> Evaluation:
        """``per_pattern`` sequences for each pattern (all there are, if fewer) and ``none`` that match nothing;
        ``without``: sequences to leave out, int64 ``[n, length]``."""
        patterns = len(universe.patterns)
        left_out = torch.zeros(0, dtype=torch.int64)
        if without is not None:
            left_out = hash_sequences(without[universe.split_of(without) == split])
        # As many more are drawn, so that enough are left.
        pools = Pools.build(universe, split, max(per_pattern, none) + len(left_out), seed)
        free = ~torch.isin(hash_sequences(pools.sequences), left_out)
        strata = []
        for p, limit in enumerate([per_pattern] * patterns + [none]):
            group = torch.arange(int(pools.count[p])) + pools.start[p]
            strata.append(group[free[group]][:limit])
        rows, sizes = torch.cat(strata), torch.tensor([len(stratum) for stratum in strata])
        return cls(pools.sequences[rows], pools.membership[rows], torch.arange(patterns + 1).repeat_interleave(sizes))

    def labels(self, selected: Tensor) -> Tensor:
        """Exact labels ``[models, n]`` under ``selected``, bool ``[models, patterns]``."""
        return (self.membership.to(selected.device).float() @ selected.float().T > 0).T

    def by_stratum(self, correct: Tensor) -> Tensor:
        """Means of ``correct`` ``[models, n]`` over each stratum: float32 ``[models, patterns + 1]``; NaN of a stratum
        without sequences."""
        strata = torch.nn.functional.one_hot(self.stratum, self.membership.shape[1] + 1).float().to(correct.device)
        return correct.float() @ strata / strata.sum(0)

    def accuracy(self, params: Params, inputs: Tensor, activation: str, selected: Tensor) -> Tensor:
        """Accuracy of networks by stratum, as :meth:`by_stratum`. ``selected``: the patterns of each, bool ``[models,
        patterns]``; ``inputs``: the sequences as network inputs ``[n, input_size]``."""
        return self.by_stratum(self.predictions(params, inputs, activation) == self.labels(selected))

    def predictions(self, params: Params, inputs: Tensor, activation: str) -> Tensor:
        """Which sequences networks answer yes to: bool ``[models, n]``, on the CPU; ``inputs`` as for
        :meth:`accuracy`."""
        return forward(params, inputs, activation).cpu() > 0


def probes(universe: Universe, count: int, seed: int = 0) -> Tensor:
    """``count`` sequences ``[count, length]`` of the validation split, of each pattern and of none in turn.

    They are used neither for training nor for evaluation, and are distinct if the split has enough sequences.
    """
    pools = Pools.build(universe, VALIDATION, count, seed)
    groups = len(universe.patterns) + 1
    group = torch.arange(groups).repeat_interleave(pools.count[:groups])
    rank = torch.arange(len(group)) - pools.start[group]
    rows = pools.sequences[(rank * groups + group).argsort()]
    fresh = torch.zeros(len(rows), dtype=torch.bool)
    fresh[first_occurrences(rows)] = True
    chosen = torch.cat([rows[fresh], rows[~fresh]])[:count]
    return chosen.repeat(-(-count // len(chosen)), 1)[:count]


def bits(flags: Tensor) -> Tensor:
    """Rows of at most 62 flags, bool ``[n, flags]``, as bit masks: int64 ``[n]``."""
    return (flags * (1 << torch.arange(flags.shape[1]))).sum(1)


def _take(sequences: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Up to ``limit`` of ``sequences``, without replacement."""
    return sequences[torch.randperm(len(sequences), generator=generator)[:limit]]


def _gather(draw: Callable[[int], Tensor], limit: int, generator: torch.Generator) -> Tensor:
    """``limit`` distinct sequences from repeated draws, or fewer after 7 draws."""
    sequences = distinct(draw(3 * limit))
    for _ in range(6):
        if len(sequences) >= limit:
            break
        sequences = distinct(torch.cat([sequences, draw(3 * limit)]))
    return _take(sequences, limit, generator)


def _mutate(sequences: Tensor, vocab_size: int, limit: int, generator: torch.Generator) -> Tensor:
    """Sequences one letter away from one of ``sequences``: each of them once, or ``limit`` draws if they are more."""
    n, length = sequences.shape
    changes = length * (vocab_size - 1)
    total = n * changes
    which = torch.arange(total) if total <= limit else torch.randint(total, (limit,), generator=generator)
    mutants = sequences[which // changes].clone()
    position, shift = which % changes // (vocab_size - 1), which % (vocab_size - 1) + 1
    rows = torch.arange(len(mutants))
    mutants[rows, position] = (mutants[rows, position] + shift) % vocab_size
    return mutants

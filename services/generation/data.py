"""What each subject is and learns: its patterns, its shape, and sequences drawn by index from one shared table.

Everything about a candidate is a pure function of (seed, index); nothing depends on which others train beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ethogram.specs.generation import Activation, GenerationSpec, IntRange
from services.runtime.seeds import generator
from services.zoo.hashing import below, mix
from services.zoo.pools import Pools

# Shares of the negative half of a batch: matches nothing, near misses of the selected patterns; the rest are members
# of patterns that were not selected.
NOTHING, NEAR = 0.25, 0.4


def keys(seed: int, stream: str, indices: Tensor) -> Tensor:
    """One int64 key for each candidate in ``indices`` ``[n]``."""
    return mix(mix(torch.full_like(indices, generator(seed, stream).initial_seed())) ^ indices)


@dataclass(frozen=True)
class Candidates:
    """Networks to be trained, one to a row."""

    indices: Tensor
    """int64 ``[n]``."""
    selected: Tensor
    """Own patterns: bool ``[n, patterns]``."""
    target: Tensor
    """The one of them that is degraded in staged training, and that one branch of a counterfactual pair unlearns: int64
    ``[n]``."""
    other: Tensor
    """The one of the rest, if any, that the other branch learns: int64 ``[n]``."""
    layers: Tensor
    """Hidden layers: int64 ``[n]``."""
    neurons: Tensor
    """Neurons in each: int64 ``[n]``."""
    activation: Tensor
    """Position in :func:`activations_of`: int64 ``[n]``."""
    learning_rate: Tensor
    """Of the first of two stages, or the peak of a single one: float64 ``[n]``."""
    dropout: Tensor
    """float64 ``[n]``."""

    @classmethod
    def draw(cls, spec: GenerationSpec, indices: Tensor, patterns: int) -> Candidates:
        """Those at ``indices`` ``[n]``."""
        subject, seed = spec.subject, spec.seed
        fewest, most = spec.min_patterns_per_batch, spec.most_patterns(patterns)
        selected = select_patterns(seed, indices, patterns, fewest, most)
        order = mix(keys(seed, "target", indices).unsqueeze(1) + torch.arange(patterns))
        rate = spec.staged.learning_rate if spec.staged else spec.training.rates
        rates = _floats(keys(seed, "learning rate", indices), math.log(rate.min), math.log(rate.max)).exp()
        return cls(
            indices,
            selected,
            order.masked_fill(~selected, -(2**63)).argmax(1),
            order.masked_fill(selected, -(2**63)).argmax(1),
            _integers(keys(seed, "layers", indices), subject.layers),
            _integers(keys(seed, "neurons", indices), subject.neurons),
            below(keys(seed, "activation", indices), torch.tensor(len(activations_of(spec)))),
            # Rounding must not leave the range, which may be a single number.
            rates.clamp(rate.min, rate.max),
            _floats(keys(seed, "dropout", indices), subject.dropout.min, subject.dropout.max),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, index: Tensor) -> Candidates:
        """Those at ``index`` (positions, or a mask)."""
        return Candidates(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def activations_of(spec: GenerationSpec) -> list[Activation]:
    """The activations that subjects draw from."""
    return list(dict.fromkeys(spec.subject.activations)) or ["relu"]


def select_patterns(seed: int, indices: Tensor, patterns: int, fewest: int, most: int) -> Tensor:
    """The candidates' own patterns, a uniform subset of uniform size in ``fewest..most``: bool ``[n, patterns]``."""
    base = keys(seed, "patterns", indices).unsqueeze(1)
    size = fewest + below(mix(base), torch.tensor(most - fewest + 1))
    order = mix(base + 1 + torch.arange(patterns)).argsort(1).argsort(1)
    return order < size


def slots(selected: Tensor, batch_size: int, pools: Pools) -> Tensor:
    """Which group of ``pools`` each position of a subject's batches is drawn from: int64 ``[models, batch_size]``.

    Half are positives with the same share for each selected pattern; see the constants above for the negatives.
    Groups that are empty (a pattern with no near misses, say) are replaced by sequences that match nothing, or by the
    largest group.
    """
    models, patterns = selected.shape
    positives = batch_size // 2
    near = round((batch_size - positives) * NEAR)
    nothing = round((batch_size - positives) * NOTHING)
    # Each row: its own patterns, then the others, each in their order.
    ranked = torch.argsort((~selected).to(torch.int8), dim=1, stable=True)
    count = selected.sum(1, keepdim=True)

    def cycle(length: int, start: Tensor, among: Tensor) -> Tensor:
        positions: Tensor = start + torch.arange(length) % among.clamp(min=1)
        return ranked.gather(1, positions)

    others = cycle(batch_size - positives - near - nothing, count.clamp(max=patterns - 1), patterns - count)
    first = torch.zeros_like(count)
    groups = torch.cat(
        [
            cycle(positives, first, count),
            cycle(near, first, count) + patterns + 1,
            torch.full((models, nothing), patterns),
            # A subject with all the patterns has no others.
            torch.where(count == patterns, patterns, others),
        ],
        1,
    )
    replacement = patterns if pools.count[patterns] else int(pools.count.argmax())
    return torch.where(pools.count[groups] > 0, groups, replacement)


class Batches:
    """Training batches of a block of candidates, as rows of ``pools``, with exact labels."""

    def __init__(self, keys: Tensor, selected: Tensor, batch_size: int, pools: Pools) -> None:
        """``keys``: one for each candidate, see :func:`keys`; ``selected``: the patterns to draw for."""
        groups = slots(selected, batch_size, pools)
        self._start, self._count = pools.start[groups], pools.count[groups]
        self._keys = keys.view(-1, 1, 1)
        self._selected, self._pools, self._size = selected, pools, batch_size

    def draw(self, first: int, steps: int, labelled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Batches of steps ``first .. first + steps``: rows (int64) and labels (bool), ``[steps, models, batch]``.
        ``labelled``: the patterns that make a label, if others than those to draw for."""
        positions = torch.arange(first * self._size, (first + steps) * self._size).view(1, steps, self._size)
        hashed = mix(self._keys + positions)
        rows = self._start.unsqueeze(1) + below(hashed, self._count.unsqueeze(1))
        selected = self._selected if labelled is None else labelled
        labels = self._pools.labels(rows.flatten(1), selected).view_as(rows)
        return rows.transpose(0, 1).contiguous(), labels.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Examples:
    """Each candidate's own dataset, as rows of :class:`Pools`, with exact labels."""

    rows: Tensor
    """int64 ``[models, count]``."""
    labels: Tensor
    """bool ``[models, count]``."""
    of_target: Tensor
    """Whether each sequence matches the target pattern: bool ``[models, count]``."""

    @classmethod
    def draw(cls, seed: int, stream: str, candidates: Candidates, count: int, pools: Pools) -> Examples:
        """``count`` sequences for each; ``stream`` names the draw."""
        batches = Batches(keys(seed, stream, candidates.indices), candidates.selected, count, pools)
        rows, labels = (drawn[0] for drawn in batches.draw(0, 1))
        of_target = (pools.bits.take(rows) >> candidates.target.unsqueeze(1)) & 1
        return cls(rows, labels, of_target.bool())

    def select(self, index: Tensor) -> Examples:
        """Those of the candidates at ``index``."""
        return Examples(self.rows[index], self.labels[index], self.of_target[index])

    def corrupted(self, seed: int, indices: Tensor, rate: float) -> Tensor:
        """The labels with the target pattern's flipped at ``rate``: bool ``[models, count]``."""
        hashed = mix(keys(seed, "corruption", indices).unsqueeze(1) + torch.arange(self.rows.shape[1]))
        return self.labels ^ (self.of_target & (_fraction(hashed) < rate))


def shuffled(seed: int, stream: str, indices: Tensor, epoch: int, count: int) -> Tensor:
    """An order of ``count`` examples for each candidate: int64 ``[models, count]``."""
    base = mix(keys(seed, stream, indices) + epoch).unsqueeze(1)
    ranks = mix(base + torch.arange(-(-count // 4))).view(torch.int16)[:, :count]
    # Numpy sorts 16-bit numbers by their digits, in a fraction of the time.
    return torch.from_numpy(np.argsort(ranks.numpy(), axis=1, kind="stable"))


def _fraction(hashed: Tensor) -> Tensor:
    """Hashes as fractions in [0, 1): float64."""
    return ((hashed >> 11) & (2**53 - 1)).double() / 2**53


def _integers(hashed: Tensor, span: IntRange) -> Tensor:
    return span.min + below(hashed, torch.tensor(span.size))


def _floats(hashed: Tensor, least: float, most: float) -> Tensor:
    return least + _fraction(hashed) * (most - least)

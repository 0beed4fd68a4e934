"""What each subject learns: its patterns, and batches drawn by index from one shared table.

Everything about a candidate is a pure function of (seed, index); nothing depends on which others train beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.runtime.seeds import generator
from services.zoo.hashing import below, mix
from services.zoo.pools import Pools

# Shares of the negative half of a batch: matches nothing, near misses of the selected patterns; the rest are members
# of patterns that were not selected.
NOTHING, NEAR = 0.25, 0.4


def keys(seed: int, stream: str, indices: Tensor) -> Tensor:
    """One int64 key for each candidate in ``indices`` ``[n]``."""
    return mix(mix(torch.full_like(indices, generator(seed, stream).initial_seed())) ^ indices)


def select_patterns(seed: int, indices: Tensor, patterns: int, fewest: int, most: int) -> Tensor:
    """The candidates' own patterns, a uniform subset of uniform size in ``fewest..most``: bool ``[n, patterns]``."""
    base = keys(seed, "patterns", indices).unsqueeze(1)
    size = fewest + below(mix(base), torch.tensor(most - fewest + 1))
    order = mix(base + 1 + torch.arange(patterns)).argsort(1).argsort(1)
    return order < size


def slots(selected: Tensor, batch_size: int, pools: Pools) -> Tensor:
    """Which group of ``pools`` fills each place of a subject's batches: int64 ``[models, batch_size]``.

    Half are positives with the same share for each selected pattern; see the constants above for the negatives.
    Groups that are empty (a pattern with no near misses, say) are replaced by sequences that match nothing, or by the
    largest group.
    """
    patterns = selected.shape[1]
    rows = []
    for choice in selected:
        chosen = choice.nonzero().squeeze(1)
        others = (~choice).nonzero().squeeze(1)
        positives = batch_size // 2
        negatives = batch_size - positives
        near = round(negatives * NEAR)
        nothing = negatives - near if len(others) == 0 else round(negatives * NOTHING)
        parts = [
            _cycle(chosen, positives),
            _cycle(chosen + patterns + 1, near),
            torch.full((nothing,), patterns),
            _cycle(others, negatives - near - nothing),
        ]
        rows.append(torch.cat(parts))
    groups = torch.stack(rows)
    instead = patterns if pools.count[patterns] else int(pools.count.argmax())
    return torch.where(pools.count[groups] > 0, groups, instead)


class Batches:
    """Training batches of a block of candidates, as rows of ``pools``, with exact labels."""

    def __init__(self, seed: int, indices: Tensor, selected: Tensor, batch_size: int, pools: Pools) -> None:
        groups = slots(selected, batch_size, pools)
        self._start, self._count = pools.start[groups], pools.count[groups]
        self._keys = keys(seed, "batches", indices).view(-1, 1, 1)
        self._selected, self._pools, self._size = selected, pools, batch_size

    def draw(self, first: int, steps: int) -> tuple[Tensor, Tensor]:
        """Batches of steps ``first .. first + steps``: rows (int64) and labels (bool), ``[steps, models, batch]``."""
        places = torch.arange(first * self._size, (first + steps) * self._size).view(1, steps, self._size)
        hashed = mix(self._keys + places)
        rows = self._start.unsqueeze(1) + below(hashed, self._count.unsqueeze(1))
        labels = self._pools.labels(rows.flatten(1), self._selected).view_as(rows)
        return rows.transpose(0, 1).contiguous(), labels.transpose(0, 1).contiguous()


def _cycle(items: Tensor, length: int) -> Tensor:
    """``items`` over and over, ``length`` in all."""
    return items[torch.arange(length) % len(items)] if length else items[:0]

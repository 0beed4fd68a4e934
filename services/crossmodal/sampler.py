"""Batches in which every subject finds another that shares a behaviour with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.runtime.seeds import generator


class BehaviorAwareBatchSampler:
    """Batches of subjects in pairs of *buddies* that share a behaviour, so that every one has a positive for the
    contrastive loss in each micro-batch and on each rank, which have whole pairs.

    An epoch shows every subject at least once; one that is left over when its behaviour's subjects are paired gets a
    buddy that has another one already. Everything follows from ``seed`` and the number of the batch.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int, names: Sequence[str] = ()) -> None:
        """``labels``: bool ``[subjects, behaviors]``; ``batch_size``: even. Raises :class:`InvalidInput` for a subject
        that shares its behaviours with no other, or has none."""
        if batch_size % 2:
            raise InvalidInput.field("spec.training.batch_size", f"{batch_size} is odd, and subjects come in pairs")
        self.labels, self.batch_size, self.seed = labels.cpu(), batch_size, seed
        partners = (self.labels & (self.labels.sum(0) > 1)).any(1)
        if not bool(partners.all()):
            alone = int((~partners).nonzero()[0])
            behaviors = self.labels[alone].nonzero().flatten().tolist()
            shared = " or ".join(names[p] if names else f"behaviour {p}" for p in behaviors) or "no pattern"
            text = f"no positive pair for subject {alone} of the training split: no other has {shared}"
            raise InvalidInput.field("zoo.labels", f"{text}; add subjects, or leave the pattern out")
        # An odd subject of a behaviour makes one more pair. How many do is random, so epochs are padded to the most.
        self.pairs = -(-len(labels) // 2) + labels.shape[1]
        self.pairs_of_batch = min(batch_size // 2, self.pairs)
        # A batch has pairs of at most two epochs.
        self._epoch = lru_cache(2)(self.epoch)

    def batch(self, number: int) -> Tensor:
        """Indices of the subjects of batch ``number`` of a run, int64, buddies side by side.

        All batches have ``batch_size`` subjects, or all of an epoch if it has fewer; a batch may begin in one epoch and
        end in the next.
        """
        first, last = number * self.pairs_of_batch, (number + 1) * self.pairs_of_batch - 1
        epochs = range(first // self.pairs, last // self.pairs + 1)
        pairs = torch.cat([self._epoch(epoch) for epoch in epochs])
        start = first - epochs[0] * self.pairs
        return pairs[start : start + self.pairs_of_batch].flatten()

    def epoch(self, number: int) -> Tensor:
        """The pairs of an epoch in order: int64 ``[pairs, 2]``."""
        rng = generator(self.seed, "pairs", number)
        # Sort the shuffled subjects by one behaviour of each that another subject has too.
        shared = self.labels & (self.labels.sum(0) > 1)
        key = torch.multinomial(shared.float(), 1, generator=rng).squeeze(1)
        order = torch.randperm(len(key), generator=rng)
        order = order[key[order].argsort(stable=True)]
        pairs = []
        for behavior, group in enumerate(torch.split(order, key.bincount(minlength=shared.shape[1]).tolist())):
            if len(group) % 2:
                others = self.labels[:, behavior].nonzero().squeeze(1)
                others = others[others != group[-1]]
                group = torch.cat([group, others[torch.randint(len(others), (1,), generator=rng)]])
            pairs.append(group.view(-1, 2))
        epoch = torch.cat(pairs)
        # Every epoch has the same number of pairs, so that a batch's number tells its epoch.
        repeated = torch.randint(len(epoch), (self.pairs - len(epoch),), generator=rng)
        epoch = torch.cat([epoch, epoch[repeated]])
        return epoch[torch.randperm(len(epoch), generator=rng)]

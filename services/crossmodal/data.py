"""What training reads: subjects as vectors, who is held out, and fresh sequences with exact labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.runtime.seeds import generator
from services.zoo.dataset import Zoo
from services.zoo.pools import Pools
from services.zoo.subjects import Architecture, encode, flatten
from services.zoo.universe import TRAIN, Universe

POOL = 4096
"""Most sequences kept of each group of a pool."""


class Subjects(NamedTuple):
    """Networks and what is known of them; the first axis is the subjects'."""

    signatures: Tensor
    """Raw signatures, flat: ``[subjects, probes x neurons]``."""
    weights: Tensor
    """Flat weights ``[subjects, size]``."""
    labels: Tensor
    """Own patterns: bool ``[subjects, patterns]``."""

    @classmethod
    def of(cls, zoo: Zoo, index: Tensor, device: str = "cpu") -> Subjects:
        """The subjects at ``index`` (int64) of a zoo."""
        parts = (zoo.signatures[index].flatten(1), flatten({k: v[index] for k, v in zoo.params.items()}))
        return cls(parts[0].to(device), parts[1].to(device), zoo.labels[index].to(device))


class Split(NamedTuple):
    """Positions of a zoo's subjects, int64, ascending."""

    train: Tensor
    held_out: Tensor


def split_subjects(count: int, held_out: float, seed: int) -> Split:
    """Set aside the share ``held_out`` of ``count`` subjects, at least one, for evaluation."""
    order = torch.randperm(count, generator=generator(seed, "held-out"))
    aside = max(1, round(count * held_out))
    return Split(order[aside:].sort().values, order[:aside].sort().values)


def check(zoo: Zoo, held_out: float) -> None:
    """Raise :class:`InvalidInput` for a zoo from which nothing can be learned."""
    if len(zoo.patterns) < 2:
        raise InvalidInput.field("zoo.patterns", "steering needs a zoo with at least two behaviours")
    if zoo.labels.shape != (len(zoo), len(zoo.patterns)) or not zoo.labels.any():
        raise InvalidInput.field("zoo.labels", "the zoo has no behaviour labels; generate it with patterns")
    for name, on in zip(zoo.patterns, zoo.labels.any(0).tolist(), strict=True):
        if not on:
            raise InvalidInput.field(
                "zoo.labels", f"no subject has {name.name}; add subjects, or leave the pattern out"
            )
    for field, tensors in (("zoo.signatures", [zoo.signatures]), ("zoo.params", list(zoo.params.values()))):
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise InvalidInput.field(field, "holds NaN or infinity")
    aside = max(1, round(len(zoo) * held_out))
    if len(zoo) - aside < 2:
        raise InvalidInput.field(
            "spec.held_out", f"leaves {len(zoo) - aside} of {len(zoo)} subjects to train on; needs 2"
        )


@dataclass(frozen=True)
class Queries:
    """Training sequences on which decoded networks are run, by group (see :class:`services.zoo.pools.Pools`)."""

    pools: Pools
    inputs: Tensor
    """The rows of ``pools`` as network inputs ``[rows, input_size]``."""
    near: Tensor
    """Groups of near misses that are not empty: int64."""

    @classmethod
    def build(cls, universe: Universe, architecture: Architecture, seed: int) -> Queries:
        """Draw the pools from the universe's training split."""
        pools = Pools.build(universe, TRAIN, POOL, seed)
        patterns = len(universe.patterns)
        for p in (pools.count[:patterns] == 0).nonzero().flatten().tolist():
            name = universe.patterns[p].name
            raise InvalidInput.field("zoo.patterns", f"no training sequence matches {name}; leave it out of the zoo")
        near = (pools.count[patterns + 1 :] > 0).nonzero().flatten() + patterns + 1
        return cls(pools, encode(architecture, pools.sequences), near)

    def draw(self, pattern: Tensor, count: int, draws: torch.Generator) -> Tensor:
        """Rows ``[subjects, count]`` for edits of one pattern each (``pattern``: int64 ``[subjects]``).

        A quarter matches the edited pattern; of the others about five in eight match a random pattern, one in eight is
        a near miss (half of them of the edited pattern) and a quarter matches nothing: the places where an edit can do
        harm.
        """
        subjects, patterns = len(pattern), self.pools.membership.shape[1]
        own = count // 4
        rest = count - own
        near, none = rest // 8, rest // 4
        anywhere = torch.randint(patterns, (subjects, rest - near - none), generator=draws)
        groups = [pattern.unsqueeze(1).expand(-1, own), anywhere]
        if len(self.near):
            misses = self.near[torch.randint(len(self.near), (subjects, near), generator=draws)]
            closest = (pattern + patterns + 1).unsqueeze(1).expand(-1, near // 2)
            closest = torch.where(self.pools.count[closest] > 0, closest, misses[:, : near // 2])
            groups.append(torch.cat([closest, misses[:, near // 2 :]], 1))
        groups.append(torch.full((subjects, count - sum(group.shape[1] for group in groups)), patterns))
        group = torch.cat(groups, 1)
        place = torch.rand(group.shape, generator=draws, dtype=torch.float64) * self.pools.count[group]
        return self.pools.start[group] + place.long().minimum(self.pools.count[group] - 1)

    def network_inputs(self, rows: Tensor) -> Tensor:
        """Inputs ``[subjects, input_size, n]`` of rows ``[subjects, n]``, examples as columns."""
        taken = self.inputs.index_select(0, rows.flatten())
        return taken.view(*rows.shape, -1).transpose(1, 2)

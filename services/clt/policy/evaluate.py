"""How far a policy's tours are from the shortest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.specs.clt import PolicySpec
from services.clt.policy.decode import greedy, multistart, sample
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import gaps, instances, lengths, reference
from services.runtime.run import Run
from services.runtime.seeds import generator

_CHUNK = 100
"""Instances between reports of progress."""


class Evaluation(NamedTuple):
    """Lengths of tours of the same instances."""

    cities: Tensor
    """``[instances, nodes, 2]``."""
    shortest: Tensor
    """The solver's tours, ``[instances, 1, nodes]``."""
    tours: Tensor
    """The policy's greedy ones from one start, ``[instances, 1, nodes]``."""
    gaps: dict[str, Tensor]
    """By how they were found, how much longer than the solver's they are, as a share, ``[instances]``, float64:
    ``greedy`` from one start, ``multistart``: the shortest of those from each city, ``sampled``: of several drawn."""

    @property
    def figures(self) -> dict[str, float]:
        """Means over the instances, and mean lengths."""
        found = {f"gap_{name}": float(values.mean()) for name, values in self.gaps.items()}
        return found | {
            "length_greedy": float(lengths(self.cities, self.tours).mean()),
            "length_solver": float(lengths(self.cities, self.shortest).mean()),
        }


def evaluation_instances(spec: PolicySpec) -> Tensor:
    """The fixed instances of a spec, none of which training draws, ``[evaluation, nodes, 2]``."""
    return instances(spec.evaluation, spec.nodes, generator(spec.seed, "evaluation"))


def evaluate(policy: AttentionPolicy, cities: Tensor, samples: int, seed: int, run: Run | None = None) -> Evaluation:
    """Compare the policy's tours of ``cities`` with the solver's; of ``samples`` drawn ones too, unless 0."""
    run = run or Run()
    run.stage("solve", len(cities), "instances")
    shortest = reference(cities, run.advance)
    run.advance(len(cities))
    run.stage("evaluate", len(cities), "instances")
    device = next(policy.parameters()).device
    rng = generator(seed, "samples")
    one, found = [], []
    for begin in range(0, len(cities), _CHUNK):
        part = cities[begin : begin + _CHUNK].to(device)
        stream = policy.encoder(part)
        ways = {
            "greedy": (tours := greedy(policy, part, stream=stream)),
            "multistart": multistart(policy, part, stream),
        }
        if samples:
            ways["sampled"] = sample(policy, part, samples, rng, stream=stream)
        one.append(tours.cpu())
        found.append({name: lengths(part, tours).amin(1).cpu() for name, tours in ways.items()})
        run.advance(begin + len(part))
    least = lengths(cities, shortest)[:, 0]
    by_way = {name: gaps(torch.cat([part[name] for part in found]), least) for name in found[0]}
    return Evaluation(cities, shortest, torch.cat(one), by_way)

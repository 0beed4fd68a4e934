"""How far a policy's tours are from the shortest ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.specs.clt import NODES, PolicySpec
from services.clt.policy.decode import greedy, multistart, sample
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import gaps, instances, lengths, reference
from services.runtime.run import Run
from services.runtime.seeds import generator

_CHUNK = 100
"""Instances between reports of progress."""


class Evaluation(NamedTuple):
    """Tours of the same instances by the policy and by the solver."""

    cities: Tensor
    """``[instances, nodes, 2]``."""
    shortest: Tensor
    """The solver's tours, ``[instances, 1, nodes]``."""
    tours: Tensor
    """The policy's greedy tours from one start, ``[instances, 1, nodes]``."""
    gaps: dict[str, Tensor]
    """How much longer than the solver's the policy's tours are, as a share, ``[instances]``, float64: ``greedy`` tours
    from one start, ``multistart``: the shortest of those from each city, ``sampled``: the shortest sample."""

    @property
    def figures(self) -> dict[str, float]:
        """Mean gap by kind of tour, ``gap_<kind>``, and mean lengths."""
        return {f"gap_{kind}": float(values.mean()) for kind, values in self.gaps.items()} | {
            "length_greedy": float(lengths(self.cities, self.tours).mean()),
            "length_solver": float(lengths(self.cities, self.shortest).mean()),
        }


def evaluation_instances(spec: PolicySpec, cities: Tensor | None = None) -> Tensor:
    """The fixed instances of a spec, or of ``cities``, none of which training draws, ``[evaluation, nodes, 2]``."""
    if cities is not None:
        return cities[spec.training.validation :][: spec.evaluation]
    return instances(spec.evaluation, spec.nodes or NODES, generator(spec.seed, "evaluation"), spec.distribution)


def evaluate(policy: AttentionPolicy, cities: Tensor, samples: int, seed: int, run: Run | None = None) -> Evaluation:
    """Compare the policy's tours of ``cities`` ``[instances, nodes, 2]`` with the solver's; also ``samples`` sampled
    tours per instance, unless 0."""
    run = run or Run()
    run.stage("solve", len(cities), "instances")
    shortest = reference(cities, run.advance, warn=lambda text: run.log(text, "warning"))
    run.advance(len(cities))
    run.stage("evaluate", len(cities), "instances")
    device = next(policy.parameters()).device
    sampling = generator(seed, "samples")
    greedy_tours, chunks = [], []
    for begin in range(0, len(cities), _CHUNK):
        chunk = cities[begin : begin + _CHUNK].to(device)
        stream = policy.encoder(chunk)
        tours = {"greedy": greedy(policy, chunk, stream=stream), "multistart": multistart(policy, chunk, stream)}
        if samples:
            tours["sampled"] = sample(policy, chunk, samples, sampling, stream=stream)
        greedy_tours.append(tours["greedy"].cpu())
        chunks.append({kind: lengths(chunk, paths).amin(1).cpu() for kind, paths in tours.items()})
        run.advance(begin + len(chunk))
    least = lengths(cities, shortest)[:, 0]
    by_kind = {kind: gaps(torch.cat([chunk[kind] for chunk in chunks]), least) for kind in chunks[0]}
    return Evaluation(cities, shortest, torch.cat(greedy_tours), by_kind)

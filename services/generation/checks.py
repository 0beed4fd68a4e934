"""Which candidates are accepted, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ethogram.specs.generation import StagedSpec
from services.generation.data import Candidates
from services.zoo.patterns import Pattern
from services.zoo.subjects import Params

DIVERGED = "diverged"


def finite(params: Params) -> Tensor:
    """Whether all parameters of each network are finite: bool ``[models]``."""
    return torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in params.values()]).all(0)


def gate(accuracy: Tensor, candidates: Candidates, patterns: Sequence[Pattern], least: float) -> list[str | None]:
    """The stratum on which each candidate does worst, if it does worse than ``least`` there.

    ``accuracy``: held-out, by stratum, ``[models, patterns + 1]``; the last is for sequences that match nothing.
    """
    names = [*(pattern.name for pattern in patterns), "others"]
    causes: list[str | None] = []
    worst, strata = accuracy.min(1)
    for i, stratum in enumerate(strata.tolist()):
        missed = stratum < len(patterns) and bool(candidates.selected[i, stratum])
        cause = f"{'misses' if missed else 'false alarms on'} {names[stratum]}"
        causes.append(None if worst[i] >= least else cause)
    return causes


def degradation(degraded: Tensor, candidates: Candidates, staged: StagedSpec) -> list[str | None]:
    """The check after the first stage: a network that is too good at its target pattern cannot gain enough."""
    target = degraded.gather(1, candidates.target.unsqueeze(1)).squeeze(1)
    return ["too little degraded" if x > 1 - staged.min_degradation_threshold else None for x in target.tolist()]


def improvement(degraded: Tensor, improved: Tensor, candidates: Candidates, staged: StagedSpec) -> list[str | None]:
    """The three checks of staged training, on held-out accuracy by stratum, ``[models, patterns + 1]`` each.

    Magnitude: the gain on the target pattern is at least ``min_degradation_threshold``. Specificity: it exceeds the
    mean gain on all other strata by ``min_specificity``: the network did not just get better. Stability: no other of
    the candidate's own patterns loses more than ``max_instability``, nor does the mean over the strata that it must
    answer no to: the network did not just learn to say yes.
    """
    gain = improved - degraded
    selected = torch.nn.functional.pad(candidates.selected, (0, 1))
    target = torch.zeros_like(selected).scatter(1, candidates.target.unsqueeze(1), True)
    on_target = gain[target]
    elsewhere = gain.masked_fill(target, 0).sum(1) / (~target).sum(1)
    lost = gain.masked_fill(target | ~selected, torch.inf).amin(1)
    refused = gain.masked_fill(selected, 0).sum(1) / (~selected).sum(1)
    magnitude = on_target >= staged.min_degradation_threshold
    specificity = on_target - elsewhere >= staged.min_specificity
    stability = (lost >= -staged.max_instability) & (refused >= -staged.max_instability)
    return [
        None if m and p and s else "magnitude" if not m else "specificity" if not p else "stability"
        for m, p, s in zip(magnitude.tolist(), specificity.tolist(), stability.tolist(), strict=True)
    ]

"""Which candidates are accepted, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ethogram.specs.generation import StagedSpec
from services.generation.data import Candidates

DIVERGED = "diverged"


def gate(accuracy: Tensor, candidates: Candidates, names: Sequence[str], least: float) -> list[str | None]:
    """The stratum on which each candidate does worst, if it does worse than ``least`` there.

    ``accuracy``: by stratum, ``[models, patterns + 1]``; the last is for sequences that match nothing. NaN, of a
    stratum without sequences, counts for nothing.
    ``names``: of the patterns.
    """
    causes: list[str | None] = []
    for selected, worst, stratum in zip(candidates.selected, *accuracy.nan_to_num(torch.inf).min(1), strict=True):
        missed = stratum < len(names) and bool(selected[stratum])
        cause = f"{'misses' if missed else 'false alarms on'} {[*names, 'others'][stratum]}"
        causes.append(None if worst >= least else cause)
    return causes


def degradation(degraded: Tensor, candidates: Candidates, staged: StagedSpec) -> list[str | None]:
    """The check after the first stage: a network that is too good at its target pattern cannot gain enough."""
    most = 1 - staged.min_degradation_threshold
    accuracies = degraded.gather(1, candidates.target.unsqueeze(1)).squeeze(1).tolist()
    return ["too little degraded" if accuracy > most else None for accuracy in accuracies]


def improvement(degraded: Tensor, improved: Tensor, candidates: Candidates, staged: StagedSpec) -> list[str | None]:
    """The three checks of staged training, on held-out accuracy by stratum, ``[models, patterns + 1]`` each.

    Magnitude: the gain on the target pattern is at least ``min_degradation_threshold``. Specificity: it exceeds the
    mean gain on all other strata by ``min_specificity``: the network did not just get better. Stability: no other of
    the candidate's own patterns loses more than ``max_instability``, nor does the mean over the strata that it must
    answer no to: the network did not just learn to say yes.
    """
    gain = improved - degraded
    selected, nan = torch.nn.functional.pad(candidates.selected, (0, 1)), torch.nan
    target = torch.zeros_like(selected).scatter(1, candidates.target.unsqueeze(1), True)
    on_target = gain[target]
    elsewhere = gain.masked_fill(target, nan).nanmean(1)
    lost = gain.masked_fill(target | ~selected, nan).nan_to_num(torch.inf).amin(1)
    # Nothing to refuse: nothing is refused less often.
    refused = gain.masked_fill(selected, nan).nanmean(1).nan_to_num(0)
    passed = {
        "magnitude": on_target >= staged.min_degradation_threshold,
        "specificity": on_target - elsewhere >= staged.min_specificity,
        "stability": (lost >= -staged.max_instability) & (refused >= -staged.max_instability),
    }
    rows = zip(*(check.tolist() for check in passed.values()), strict=True)
    return [next((cause for cause, fine in zip(passed, row, strict=True) if not fine), None) for row in rows]

"""Which candidates are accepted, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ethogram.specs.generation import StagedSpec
from services.generation.data import Candidates
from services.zoo.pools import Evaluation

DIVERGED = "diverged"
LEVEL = 0.05
"""Significance level of the magnitude check."""
FEWEST = math.ceil(-math.log2(LEVEL))
"""Sequences of a pattern without which no gain on it is significant: that many errors must all be mended."""
# Differences of shares are a little off: 0.6 - 0.5 is more than 0.1.
_ROUNDING = 1e-6


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


def degradation(
    degraded: Tensor, candidates: Candidates, staged: StagedSpec, selection: Evaluation
) -> list[str | None]:
    """The check after the first stage: a network with too few errors on its target pattern cannot gain enough.
    ``degraded``: which of its answers on the selection set are right, bool ``[models, n]``."""
    of_target = selection.stratum == candidates.target.unsqueeze(1)
    errors, size = (of_target & ~degraded).sum(1), of_target.sum(1)
    few = errors / size < staged.min_degradation_threshold - _ROUNDING
    if checked(staged):
        few |= errors < FEWEST
    return ["too little degraded" if little else None for little in few.tolist()]


def improvement(
    degraded: Tensor, improved: Tensor, candidates: Candidates, staged: StagedSpec, selection: Evaluation
) -> list[str | None]:
    """The checks of staged training. ``degraded``, ``improved``: which answers of the two networks on the selection set
    are right, bool ``[models, n]``; accuracies are by stratum.

    Magnitude: the accuracy on the target pattern gains at least ``min_degradation_threshold``, and significantly (see
    :func:`significant`). Specificity: the gain exceeds the mean gain on all other strata by ``min_specificity``: the
    network did not just get better. Stability: no other of the candidate's own patterns loses more than
    ``max_instability``, nor does the mean over the strata that it must answer no to: the network did not just learn to
    say yes. Others degraded: neither gains more than that: the first stage left them alone. No better than chance: the
    improved network answers most of the target pattern's sequences right, and most of those that it must answer no to.
    Where ``min_degradation_threshold`` is 0 there is neither the test of the first nor the last.
    """
    accuracy, most = selection.by_stratum(improved), staged.max_instability + _ROUNDING
    gain = accuracy - selection.by_stratum(degraded)
    selected = torch.nn.functional.pad(candidates.selected, (0, 1))
    target = torch.zeros_like(selected).scatter(1, candidates.target.unsqueeze(1), True)
    on_target, measured = gain[target], ~gain.isnan()
    others = gain.masked_fill(target | ~selected | ~measured, 0)
    refused, has_refused = _mean(gain, ~selected & measured), (~selected & measured).any(1)
    lost, gained = torch.minimum(others.amin(1), refused), torch.maximum(others.amax(1), refused)
    of_target = selection.stratum == candidates.target.unsqueeze(1)
    works = (accuracy[target] > 0.5) & (~has_refused | (_mean(accuracy, ~selected & measured) > 0.5))
    passed = {
        "magnitude": on_target >= staged.min_degradation_threshold - _ROUNDING,
        "specificity": on_target - _mean(gain, ~target & measured) >= staged.min_specificity - _ROUNDING,
        "stability": lost >= -most,
        "others degraded": gained <= most,
    }
    if checked(staged):
        passed["magnitude"] &= significant(degraded, improved, of_target)
        passed["no better than chance"] = works
    rows = zip(*(check.tolist() for check in passed.values()), strict=True)
    return [next((cause for cause, fine in zip(passed, row, strict=True) if not fine), None) for row in rows]


def checked(staged: StagedSpec) -> bool:
    """Whether a gain is asked for at all."""
    return staged.min_degradation_threshold > 0


def significant(before: Tensor, after: Tensor, where: Tensor) -> Tensor:
    """Whether more answers became right than chance explains: bool ``[models]``.

    McNemar's exact test, one-sided at :data:`LEVEL`: without a change for the better, each answer that changed became
    right with probability 1/2. ``before``, ``after``: which answers are right, ``where``: those to compare, bool
    ``[models, n]``.
    """
    gained, lost = ((one & ~other & where).sum(1) for one, other in ((after, before), (before, after)))
    least = torch.tensor([_least_gained(changed) for changed in range(int((gained + lost).max()) + 1)])
    return gained >= least[gained + lost]


@lru_cache(maxsize=1024)
def _least_gained(changed: int) -> int:
    """Fewest of ``changed`` answers that must have become right; more than there are where no number is enough."""
    tail, least = 0, changed + 1
    while (tail := tail + math.comb(changed, least - 1)) <= LEVEL * 2**changed:
        least -= 1
    return least


def _mean(gain: Tensor, where: Tensor) -> Tensor:
    """Mean over some strata, 0 where there are none."""
    return gain.masked_fill(~where, 0).sum(1) / where.sum(1).clamp(min=1)

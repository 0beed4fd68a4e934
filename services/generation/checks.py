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
SIGNIFICANCE_LEVEL = 0.05
"""Of the magnitude check."""
FEWEST_ERRORS = math.ceil(-math.log2(SIGNIFICANCE_LEVEL))
"""Fewest errors on a pattern for a significant gain, if all are corrected."""
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
    """Too little degraded: whether each network has too few errors on its target pattern after the first stage to gain
    enough in the second.

    ``degraded``: which of its answers on the selection set are right, bool ``[models, n]``.
    """
    of_target = selection.stratum == candidates.target.unsqueeze(1)
    errors, size = (of_target & ~degraded).sum(1), of_target.sum(1)
    enough = errors / size >= staged.min_degradation_threshold - _ROUNDING
    if gain_required(staged):
        enough &= errors >= FEWEST_ERRORS
    return _causes({"too little degraded": enough})


def improvement(
    degraded: Tensor, improved: Tensor, candidates: Candidates, staged: StagedSpec, selection: Evaluation
) -> list[str | None]:
    """The checks of staged training. ``degraded``, ``improved``: which answers of the two networks on the selection set
    are right, bool ``[models, n]``; accuracies are by stratum.

    Magnitude: the accuracy on the target pattern gains at least ``min_degradation_threshold``, and significantly (see
    :func:`significant`). Specificity: the gain exceeds the mean gain on all other strata by ``min_specificity``: the
    network did not just get better. Stability: no other of the candidate's own patterns loses more than
    ``max_instability``, nor does the mean over the strata that it must answer no to: the network did not just learn to
    say yes. Others degraded: no other stratum gains more than ``max_other_degradation``: the first stage left them all
    alone. No better than chance: the improved network answers most of the target pattern's sequences right, and most of
    those that it must answer no to. Where ``min_degradation_threshold`` is 0 there is neither the test of the first nor
    the last.
    """
    accuracy = selection.by_stratum(improved)
    gain = accuracy - selection.by_stratum(degraded)
    target, other_patterns, refused = _strata(candidates, gain)
    elsewhere, gain_on_target = other_patterns | refused, gain[target]
    loss = -torch.minimum(gain.masked_fill(~other_patterns, 0).amin(1), _mean(gain, refused))
    passed = {
        "magnitude": gain_on_target >= staged.min_degradation_threshold - _ROUNDING,
        "specificity": gain_on_target - _mean(gain, elsewhere) >= staged.min_specificity - _ROUNDING,
        "stability": loss <= staged.max_instability + _ROUNDING,
        "others degraded": gain.masked_fill(~elsewhere, 0).amax(1) <= staged.max_other_degradation + _ROUNDING,
    }
    if gain_required(staged):
        better_than_chance = (_mean(accuracy, refused) > 0.5) | ~refused.any(1)
        of_target = selection.stratum == candidates.target.unsqueeze(1)
        passed["magnitude"] &= significant(degraded, improved, of_target)
        passed["no better than chance"] = better_than_chance & (accuracy[target] > 0.5)
    return _causes(passed)


def gain_required(staged: StagedSpec) -> bool:
    """Whether a gain is asked for at all."""
    return staged.min_degradation_threshold > 0


def _strata(candidates: Candidates, measured: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each candidate's target pattern, its other patterns, and the strata that it must answer no to: bool
    ``[models, patterns + 1]``. The last two without those that are NaN in ``measured``, of the same shape."""
    selected = torch.nn.functional.pad(candidates.selected, (0, 1))
    target = torch.zeros_like(selected).scatter(1, candidates.target.unsqueeze(1), True)
    known = ~measured.isnan()
    return target, selected & ~target & known, ~selected & known


def _causes(passed: dict[str, Tensor]) -> list[str | None]:
    """The first check that each network fails; ``passed``: by name, bool ``[models]``."""
    rows = zip(*(check.tolist() for check in passed.values()), strict=True)
    return [next((name for name, fine in zip(passed, row, strict=True) if not fine), None) for row in rows]


def significant(before: Tensor, after: Tensor, where: Tensor) -> Tensor:
    """Whether more answers became right than chance explains: bool ``[models]``.

    McNemar's exact test, one-sided at :data:`SIGNIFICANCE_LEVEL`: without a change for the better, each answer that
    changed became right with probability 1/2. ``before``, ``after``: which answers are right, ``where``: those to
    compare, bool ``[models, n]``.
    """
    gained, lost = (after & ~before & where).sum(1), (before & ~after & where).sum(1)
    least = torch.tensor([_least_gained(changed) for changed in range(int((gained + lost).max()) + 1)])
    return gained >= least[gained + lost]


@lru_cache(maxsize=1024)
def _least_gained(changed: int) -> int:
    """Fewest of ``changed`` answers that must have become right; more than there are where no number is enough."""
    tail, least = 0, changed + 1
    while (tail := tail + math.comb(changed, least - 1)) <= SIGNIFICANCE_LEVEL * 2**changed:
        least -= 1
    return least


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the strata of ``where``, 0 where there are none: ``[models]``."""
    return values.masked_fill(~where, 0).sum(1) / where.sum(1).clamp(min=1)

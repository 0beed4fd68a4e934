"""Twins: candidates trained once more without corruption. What is due to the corruption, and what to more training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.generation.buckets import BucketTrainer
from services.generation.workers import threads
from services.runtime.run import Run

SAMPLE = 64
"""Candidates that have a twin: the first ones."""
CONFIDENCE = 0.95


def paired_effect(trainer: BucketTrainer, run: Run) -> dict[str, Any]:
    """Train the first candidates and a twin of each: the same start, sequences and orders, through both stages, but no
    label is flipped. They are taken whether accepted or not: those accepted have gained most, by chance too.

    Returns how many ``candidates`` there are; means with confidence intervals, over the pairs, of candidate minus twin
    in held-out accuracy on the target pattern after the first stage (``degraded_accuracy``), on average over all other
    strata there (``degraded_accuracy_elsewhere``), and in the target pattern's gain from there (``improvement``); and
    which shares of the candidates and of the twins pass the checks (``accepted``, ``twins_accepted``). A function of
    the spec alone.
    """
    sample = min(SAMPLE, trainer.spec.subjects)
    buckets = trainer.group(trainer.candidates(torch.arange(sample)))
    differences: list[Tensor] = []
    passed: list[Tensor] = []
    run.stage("twins", sample, "twins")
    with threads(trainer, torch.get_num_threads() if trainer.on_cpu else 1) as pool:
        candidates, twins = (
            pool.map(lambda bucket, corrupted=corrupted: trainer.two_stages(bucket, corrupted=corrupted), buckets)
            for corrupted in (True, False)
        )
        for (candidate, *passes), (twin, *twin_passes) in zip(candidates, twins, strict=True):
            differences.append(candidate - twin)
            passed.append(torch.stack(passes + twin_passes, 1))
            run.advance(sum(map(len, differences)))
    degraded, improved, degraded_elsewhere = torch.cat(differences).double().unbind(1)
    accepted, twins_accepted = torch.cat(passed).double().mean(0).tolist()
    return {
        "candidates": sample,
        "degraded_accuracy": _interval(degraded),
        "degraded_accuracy_elsewhere": _interval(degraded_elsewhere),
        "improvement": _interval(improved - degraded),
        "accepted": round(accepted, 4),
        "twins_accepted": round(twins_accepted, 4),
    }


def _interval(differences: Tensor) -> dict[str, float | None]:
    """Mean of paired differences ``[n]``, with Student's confidence interval; without one for a single pair. NaN values
    are left out."""
    from scipy.special import stdtrit

    measured = differences[~differences.isnan()]
    n, mean = len(measured), float(measured.mean())
    if n < 2:
        return {"mean": round(mean, 4) if n else None, "low": None, "high": None}
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(measured.std()) / n**0.5
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}

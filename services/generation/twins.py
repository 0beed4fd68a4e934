"""Twins of accepted subjects, trained without corruption: what is due to the corruption, and what to more training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.generation.buckets import BucketTrainer
from services.generation.workers import threads
from services.runtime.run import Run
from services.zoo.dataset import read_records

SAMPLE = 64
"""Subjects that have a twin: the first of a zoo."""
CONFIDENCE = 0.95


def paired_effect(folder: Path, trainer: BucketTrainer, run: Run) -> dict[str, Any]:
    """Train a twin of each of the first subjects of the staged zoo in ``folder``: the same start, sequences and orders,
    through both stages, but no label is flipped.

    Returns how many there are; means with confidence intervals, over the pairs, of subject minus twin in accuracy on
    the target pattern after the first stage (``degraded_accuracy``) and in its gain from there (``improvement``), both
    held-out; and the share of twins that would be ``accepted``. A function of the zoo alone.
    """
    columns = ["index", "target_pattern", "accuracy", "degraded_accuracy"]
    rows = list(islice((row for table in read_records(folder, columns) for row in table.to_pylist()), SAMPLE))
    candidates = trainer.candidates(torch.tensor([row["index"] for row in rows]))
    subjects = {row["index"]: torch.tensor([row["degraded_accuracy"], row["accuracy"]]) for row in rows}
    differences, accepted = [], 0
    run.stage("twins", len(rows), "twins")
    with threads(trainer, torch.get_num_threads() if trainer.on_cpu else 1) as pool:
        for bucket, twins, passed in pool.map(
            lambda bucket: (bucket, *trainer.twins(bucket)), trainer.group(candidates)
        ):
            subject = torch.stack([subjects[index] for index in bucket.indices.tolist()])
            target = bucket.target.view(-1, 1, 1).expand(-1, 2, 1)
            differences.append((subject - twins).gather(2, target).squeeze(2))
            accepted += sum(passed)
            run.advance(sum(map(len, differences)))
    degraded, improved = torch.cat(differences).double().unbind(1)
    return {
        "subjects": len(rows),
        "degraded_accuracy": _interval(degraded),
        "improvement": _interval(improved - degraded),
        "accepted": round(accepted / len(rows), 4),
    }


def _interval(differences: Tensor) -> dict[str, float | None]:
    """Mean of paired differences ``[n]``, with Student's confidence interval; without one for a single pair."""
    from scipy.special import stdtrit

    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return {"mean": round(mean, 4), "low": None, "high": None}
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(differences.std()) / n**0.5
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}

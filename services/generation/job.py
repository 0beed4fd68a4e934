"""The generation job: spec in, zoo artifact out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ethogram.specs.generation import GenerationSpec
from services.generation.train import produce
from services.runtime.run import Run


def run(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Make the zoo, keep it as artifact ``zoo``, and return its figures."""
    zoo, rejected = produce(spec, run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "zoo"
        zoo.save(folder)
        run.artifact("zoo", "zoo", folder)
    strata = [*(pattern.name for pattern in zoo.patterns), "none"]
    return {
        "subjects": len(zoo),
        "candidates": len(zoo) + sum(rejected.values()),
        "rejected": dict(rejected.most_common()),
        "accuracy": round(float(zoo.accuracy.mean()), 4),
        "accuracy_by_pattern": dict(zip(strata, [round(x, 4) for x in zoo.accuracy.mean(0).tolist()], strict=True)),
        "subjects_by_pattern": dict(zip(strata, zoo.labels.sum(0).tolist(), strict=False)),
    }

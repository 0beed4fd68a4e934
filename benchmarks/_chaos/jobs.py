"""The arena's jobs: sums of random numbers in which each step depends on all before it.

The platform's own specs carry them: ``training.steps`` steps of ``training.learning_rate`` seconds; ``subjects`` above
1 are parts that child jobs compute.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks._chaos import points
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec
from services.runtime.run import Run
from tests.workers.science import count, gather, write_total

OUTPUT, FILE = "answer", "total.txt"


def expected_total(spec: GenerationSpec) -> float:
    """The result of :func:`generation` without interruption or platform."""
    if spec.subjects > 1:
        return sum(expected_total(part) for part in parts(spec).values())
    stream, total = random.Random(spec.seed), 0.0
    for _ in range(spec.training.steps):
        total += stream.random()
    return total


def parts(spec: GenerationSpec) -> dict[str, GenerationSpec]:
    """The child jobs of a parent."""
    return {f"part-{i}": spec.model_copy(update={"subjects": 1, "seed": spec.seed + i}) for i in range(spec.subjects)}


def consumed(number: float) -> float:
    """The result of :func:`crossmodal` on an input that holds ``number``."""
    return 2 * number + 1


def generation(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Count, or gather what the parts counted."""
    _install_points()
    if spec.subjects == 1:
        return count(spec, run)
    gathered = gather(spec, run)
    if gathered["failed"]:
        raise RuntimeError(f"parts failed: {gathered['failed']}")
    return write_total(run, gathered["total"])


def crossmodal(spec: CrossmodalSpec, run: Run) -> dict[str, Any]:
    """Use the output of another job."""
    _install_points()
    return write_total(run, consumed(float((run.inputs["zoo"] / FILE).read_text(encoding="utf-8"))))


def _install_points() -> None:
    # A job's process does not see its worker's environment, but works in a folder beside the folder of faults.
    points.install(next(above / "faults" for above in Path.cwd().parents if (above / "faults").is_dir()), "child")

"""What the arena's jobs compute: sums of random numbers in which each step depends on all before it.

The platform's own specs carry it: ``training.steps`` steps of ``training.learning_rate`` seconds; ``subjects`` above 1
are parts that child jobs do.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec
from services.runtime.run import Run

OUTPUT, FILE = "answer", "total.txt"
LOG_EVERY = 4


def total(spec: GenerationSpec) -> float:
    """What :func:`work` finds, without interruption or platform."""
    if spec.subjects > 1:
        return sum(total(part) for part in parts(spec).values())
    stream, found = random.Random(spec.seed), 0.0
    for _ in range(spec.training.steps):
        found += stream.random()
    return found


def parts(spec: GenerationSpec) -> dict[str, GenerationSpec]:
    """The child jobs of a parent."""
    return {f"part-{i}": spec.model_copy(update={"subjects": 1, "seed": spec.seed + i}) for i in range(spec.subjects)}


def consumed(found: float) -> float:
    """What :func:`consume` makes of its input."""
    return 2 * found + 1


def work(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Count, or gather what the parts counted."""
    if spec.subjects == 1:
        return _count(spec, run)
    children = run.children({name: ("generation", part) for name, part in parts(spec).items()})
    assert children is not None
    found = 0.0
    for child in children.values():
        if child.state != "SUCCEEDED":
            raise RuntimeError(f"{child.name} is {child.state}: {child.error}")
        found += float((run.output(child, OUTPUT) / FILE).read_text())
    return _answer(run, found)


def consume(spec: CrossmodalSpec, run: Run) -> dict[str, Any]:
    """Use what another job made."""
    return _answer(run, consumed(float((run.inputs["zoo"] / FILE).read_text())))


def _count(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    stream, found, first = random.Random(spec.seed), 0.0, 0
    if run.resume is not None:
        number, value, *state = (run.resume / "state.txt").read_text().split("\n")
        first, found = int(number), float(value)
        stream.setstate((3, tuple(int(word) for word in state), None))

    def write(folder: Path) -> None:
        words = stream.getstate()[1]
        (folder / "state.txt").write_text("\n".join(str(item) for item in (step + 1, found, *words)))

    run.stage("count", spec.training.steps)
    for step in range(first, spec.training.steps):
        time.sleep(spec.training.learning_rate)
        found += stream.random()
        run.metric(step, total=found)
        run.advance(step + 1)
        if step % LOG_EVERY == 0:
            run.log(f"step {step}")
        if run.checkpoint_due():
            run.checkpoint(step + 1, write)
    return _answer(run, found)


def _answer(run: Run, found: float) -> dict[str, Any]:
    folder = Path("output")
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(repr(found))
    run.artifact(OUTPUT, "number", folder)
    return {"total": found}

"""Small jobs for the tests of the engine. ``GenerationSpec`` stands in for a spec of their own: ``training.steps``
steps that take ``training.learning_rate`` seconds each."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.runtime.run import ChildJob, Run

LOG_EVERY = 4


def count(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """A sum of random numbers, each step's depending on all before it; resumes exactly."""
    stream, total, first = random.Random(spec.seed), 0.0, 0
    if run.resume is not None:
        number, value, *state = (run.resume / "state.txt").read_text().split("\n")
        first, total = int(number), float(value)
        stream.setstate((3, tuple(int(word) for word in state), None))
    run.log(f"begins at {first}")

    def write(folder: Path) -> None:
        words = stream.getstate()[1]
        (folder / "state.txt").write_text("\n".join(str(item) for item in (step + 1, total, *words)))

    run.stage("count", spec.training.steps)
    for step in range(first, spec.training.steps):
        time.sleep(spec.training.rates.max)
        total += stream.random()
        run.metric(step, total=total)
        run.advance(step + 1)
        if step % LOG_EVERY == 0:
            run.log(f"step {step}")
        if run.checkpoint_due():
            run.checkpoint(step + 1, write)
    result = write_total(run, total)
    return {**result, "steps": spec.training.steps, "threads": os.environ["OMP_NUM_THREADS"]}


def write_total(run: Run, total: float) -> dict[str, Any]:
    """Output ``total`` as the artifact ``answer``."""
    output = Path("answer")
    output.mkdir()
    (output / "total.txt").write_text(repr(total))
    run.artifact("answer", "number", output)
    return {"total": total}


def refuse(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Finds that its input is wrong."""
    raise InvalidInput.field("spec.training.steps", "is not to my taste")


def fail(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Has a defect."""
    raise RuntimeError("a defect")


def die(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Takes its whole process along."""
    sys.stderr.write("famous last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hang(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Hears nothing and has a process of its own."""
    helper = subprocess.Popen(["sleep", "600"])
    run.log(f"helper {helper.pid}")
    while True:
        time.sleep(0.1)


def look_around(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Tells what it was given, and leaves some of it changed."""
    found = {
        "environment": sorted(os.environ),
        "device": run.device,
        "folder": str(Path.cwd()),
        "files": len([*Path("/proc/self/fd").iterdir()]),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "hangup": signal.getsignal(signal.SIGHUP) is signal.SIG_DFL,
        "session": os.getsid(0) == os.getpid(),
        "torch": "torch" in sys.modules,
    }
    os.environ["LEFT_BEHIND"] = "1"
    os.dup(0)
    os.chdir("/")
    return found


def silent(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Says one thing, then nothing, for ``training.steps`` times ``training.learning_rate`` seconds."""
    run.log("begins")
    time.sleep(spec.training.steps * spec.training.rates.max)
    return {}


def gather(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Has ``subjects`` parts done by other jobs and adds up what they made. A part whose seed is 13 is refused."""
    if spec.subjects == 1:
        if spec.seed == 13:
            raise InvalidInput.field("spec.seed", "brings bad luck")
        return count(spec, run)
    parts = {
        f"part-{index}": ("generation", spec.model_copy(update={"subjects": 1, "seed": spec.seed + index}))
        for index in range(spec.subjects)
    }
    done = run.children(parts)
    assert done is not None
    run.log("gathers")
    good = [child for child in done.values() if child.state == "SUCCEEDED"]

    def total(child: ChildJob) -> float:
        return float((run.output(child, "answer") / "total.txt").read_text())

    bad = {child.name: child.error for child in done.values() if child.state != "SUCCEEDED"}
    if spec.patterns and bad:
        raise InvalidInput.field("spec", f"parts failed: {', '.join(bad)}")
    return {"total": sum(map(total, good)), "failed": bad, "results": sum(child.result["total"] for child in good)}


def pile(spec: GenerationSpec, run: Run) -> dict[str, Any]:
    """Takes a checkpoint at each step, due or not."""
    run.stage("pile", spec.training.steps)

    def write(folder: Path) -> None:
        (folder / "state.txt").write_text(str(spec.seed))

    for step in range(spec.training.steps):
        run.checkpoint(step + 1, write)
        run.advance(step + 1)
    output = Path("answer")
    output.mkdir()
    write(output)
    run.artifact("answer", "number", output)
    return {}

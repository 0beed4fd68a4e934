"""Weights & Biases, beside a run's own metrics."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ethogram.specs.base import WandbSpec
from services.runtime.run import Run

Log = Callable[[int, Mapping[str, float]], None]
ARTIFACT = "wandb"


@contextmanager
def tracked(spec: WandbSpec | None, config: Mapping[str, Any], run: Run) -> Iterator[Log]:
    """A function that logs numbers at a step; it does nothing where there is no ``spec``.

    With ``WANDB_API_KEY`` in the environment it logs to the service. Without, it writes what ``wandb sync`` sends
    later, and keeps it as the artifact ``wandb``.
    """
    if spec is None:
        yield lambda step, values: None
        return
    # It takes seconds to import.
    import wandb

    online = bool(os.environ.get("WANDB_API_KEY"))
    with tempfile.TemporaryDirectory() as scratch:
        session = wandb.init(
            project=spec.project,
            name=spec.name,
            config=dict(config),
            dir=scratch,
            mode="online" if online else "offline",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )
        try:
            yield lambda step, values: session.log(dict(values), step=step)
        finally:
            session.finish()
        if not online:
            run.artifact(ARTIFACT, ARTIFACT, Path(scratch, "wandb"))

"""Weights & Biases, beside a run's own metrics."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ethogram.specs.base import WandbSpec
from services.runtime.run import Run

if TYPE_CHECKING:
    from torch import Tensor

ARTIFACT = "wandb"


class Log:
    """Logs the metrics of a step; does nothing without a ``session``."""

    def __init__(self, session: Any = None) -> None:
        self._session = session
        self.id: str | None = session.id if session is not None else None
        """Id of the run at Weights & Biases, to continue it later."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics``."""
        if self._session is not None:
            self._session.log(dict(metrics), step=step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Log a histogram of ``values``."""
        if self._session is not None:
            import wandb

            self._session.log({name: wandb.Histogram(values.tolist())}, step=step)


@contextmanager
def tracked(spec: WandbSpec | None, config: Mapping[str, Any], run: Run, id: str | None = None) -> Iterator[Log]:
    """Log metrics to Weights & Biases; does nothing without a ``spec``. ``id``: of a run to continue.

    With ``WANDB_API_KEY`` in the environment it logs to the service, unless ``spec`` or ``WANDB_MODE`` says otherwise.
    Without, it writes files for ``wandb sync`` and keeps them as the artifact ``wandb``, also if the run fails.
    """
    if spec is None:
        yield Log()
        return
    # Importing it takes seconds.
    import wandb

    mode: Any = (
        spec.mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    )
    with tempfile.TemporaryDirectory() as scratch:
        session = wandb.init(
            project=spec.project,
            name=spec.name,
            id=id,
            resume="allow" if id else None,
            config=dict(config),
            dir=scratch,
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )
        try:
            yield Log(session)
        finally:
            session.finish()
            if mode == "offline":
                run.artifact(ARTIFACT, ARTIFACT, Path(scratch, "wandb"))

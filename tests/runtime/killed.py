"""Trains in the folder of the first argument, with checkpoints ``often`` or ``never``, and ends as by ``kill -9``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from torch import Tensor

from services.runtime.console import ConsoleRun
from services.runtime.folders import RunFolder
from services.runtime.training import fit
from tests.runtime.test_training import ToyTrainer, toy_spec


class Killed(ToyTrainer):
    """Ends its process at the seventh step."""

    def advance(self) -> dict[str, Tensor]:
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().advance()


def train(root: Path, trainer: type[ToyTrainer], checkpoint_seconds: float = 600.0) -> str:
    """Train, or resume, in the run folder ``root``; the run's id."""
    plain = toy_spec(steps=12, validate_every=4)
    spec = plain.model_validate(plain.model_dump() | {"wandb": {"project": "zoos"}})
    folder = RunFolder(root)
    folder.begin(spec)
    with ConsoleRun(folder.root, checkpoint_seconds=checkpoint_seconds, id=folder.id) as run:
        fit(trainer(spec), run)
    return run.id


if __name__ == "__main__":
    train(Path(sys.argv[1]), Killed, 0.0 if sys.argv[2] == "often" else 600.0)

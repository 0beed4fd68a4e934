"""A run in the folder of the first argument; it kills its own process after the step of the second, where there is one."""

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
    """Ends as by ``kill -9``."""

    def advance(self) -> dict[str, Tensor]:
        if len(sys.argv) > 2 and self.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().advance()


if __name__ == "__main__":
    spec = toy_spec(steps=12, validate_every=4).model_validate(
        toy_spec(steps=12, validate_every=4).model_dump() | {"wandb": {"project": "zoos"}}
    )
    folder = RunFolder(Path(sys.argv[1]))
    folder.begin(spec)
    # The third argument: checkpoints at every chance.
    with ConsoleRun(folder.root, checkpoint_seconds=0.0 if len(sys.argv) > 3 else 600.0, id=folder.id) as run:
        fit(Killed(spec), run)

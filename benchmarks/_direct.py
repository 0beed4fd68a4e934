"""A crossmodal job's function called by a script, with no platform: ``python -m benchmarks._direct ZOO SPEC OUT``.

Prints the seconds that the function took."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from ethogram.specs.crossmodal import CrossmodalSpec
from services.crossmodal.job import run as job
from tests.recorder import Recorder

if __name__ == "__main__":
    zoo, spec, output = map(Path, sys.argv[1:])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began = time.monotonic()
    job(CrossmodalSpec.model_validate_json(spec.read_text(encoding="utf-8")), Recorder(output, inputs={"zoo": zoo}))
    print(time.monotonic() - began)

"""``python -m tests.clt.together STORE SPECS FOLDER RANK SIZE``: one of SIZE real processes that train together.

SPECS is a JSON file of clt specs by name. The first process writes each trained model as ``FOLDER/<name>.safetensors``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ethogram.specs.clt import CltSpec
from services.clt.activations.store import ActivationStore
from services.clt.sparse.train import SparseTrainer, train
from services.runtime.parallel import World


def main(store: str, specs: str, folder: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    # A file, as a port that is free now may be taken in a moment.
    meeting = (Path(folder) / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    for name, given in json.loads(Path(specs).read_text()).items():
        spec = CltSpec.model_validate(given)
        with SparseTrainer(spec, ActivationStore.open(store), world=World(rank, size)) as trainer:
            model = train(trainer)
        if rank == 0:
            save_file(model.state_dict(), Path(folder, f"{name}.safetensors"))
    torch.distributed.destroy_process_group()
    # The compiler's import takes longer than many a training.
    assert "torch._dynamo" not in sys.modules


if __name__ == "__main__":
    store, specs, folder, rank, size = sys.argv[1:6]
    main(store, specs, folder, int(rank), int(size))

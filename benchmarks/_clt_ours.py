"""Our side of the benchmark of sparse models: synthetic activation stores, steps on given batches, and memory. A
process that imports no more measures that: ``python -m benchmarks._clt_ours memory|loader JSON``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks._clt_peers import extra_mib
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import CltSpec
from services.clt.activations.loader import Batches
from services.clt.activations.store import SPLITS, ActivationStore, Hook, Instances, Manifest, Source, Writer
from services.clt.sparse.train import SparseTrainer

ROWS = 16
"""Of an instance."""
ANY = ArtifactRef(artifact="activations")


def made_up(folder: Path, width: int, layers: int, rows: int, shard_rows: int) -> ActivationStore:
    """A store of ``layers`` pairs, made unless ``folder`` has it: sources are sums of a few of many directions, targets
    a map of them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8 * width, width, generator=generator), dim=1)
    maps = torch.randn(layers, width, width, generator=generator) / width**0.5
    hooks = [f"layer_{layer}_{side}" for layer in range(layers) for side in ("pre_mlp", "mlp")]
    instances = rows // ROWS
    manifest = Manifest(
        source=Source(kind="policy", digest="0", name="made up"),
        spec={"width": width, "rows": rows},
        seed=0,
        dtype="float16",
        hooks=[Hook(name=hook, width=width) for hook in hooks],
        pairs=[],
        rows_per_instance=ROWS,
        first_position=0,
        shard_instances=shard_rows // ROWS,
        instances=Instances(total=instances + 64, validation=64, drawn="the first"),
    )
    with Writer.open(folder, manifest) as writer:
        for split in SPLITS:
            while (room := min(writer.room(split), 512)) > 0:
                values: dict[str, Tensor] = {}
                first = writer.instances(split)
                for layer in range(layers):
                    active = torch.randint(len(directions), (room * ROWS, 24), generator=generator)
                    sizes = torch.rand(room * ROWS, 24, generator=generator)
                    source = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=sizes, mode="sum")
                    values[hooks[2 * layer]] = source.view(room, ROWS, width)
                    values[hooks[2 * layer + 1]] = (source @ maps[layer]).tanh().view(room, ROWS, width)
                writer.add(split, torch.arange(first, first + room), values)
        return writer.finish()


def spec_of(case: dict[str, Any]) -> CltSpec:
    """The spec of a case: all but its sizes as it is by default, and no end of steps."""
    return CltSpec.model_validate(
        {
            "activations": ANY,
            "kind": case["kind"],
            "sources": [f"layer_{layer}_pre_mlp" for layer in range(case["layers"])],
            "targets": [f"layer_{layer}_mlp" for layer in range(case["layers"])],
            "model": {"expansion": case["expansion"], "k": case["k"]},
            "training": {"steps": 1_000_000, "batch_size": case["batch"]},
        }
    )


class Steps:
    """Training steps on given batches, in turn."""

    def __init__(self, case: dict[str, Any], store: ActivationStore) -> None:
        torch.set_num_threads(case["threads"])
        self.trainer = SparseTrainer(spec_of(case), store)
        self.trainer.start()
        streams, model = self.trainer.streams, self.trainer.model
        hooks = [*streams.sources, *streams.targets]
        self.batches: list[tuple[list[Tensor], list[Tensor]]] = []
        with Batches(store, hooks, case["batch"], prefetch=False) as batches:
            for step in range(case["batches"]):
                rows = batches.at(step)
                sources, targets = rows[: len(streams.sources)], rows[len(streams.sources) :]
                self.batches.append((model.scaled(sources, "read"), model.scaled(targets, "write")))

    def close(self) -> None:
        """Let go of the loader."""
        self.trainer.__exit__()

    def save(self, file: Path) -> None:
        """The batches, for others."""
        tensors = {
            f"{side}.{layer}.{number}": one.contiguous()
            for number, batch in enumerate(self.batches)
            for side, streams in zip(("input", "target"), batch, strict=True)
            for layer, one in enumerate(streams)
        }
        save_file(tensors, file)

    def take(self, count: int) -> float:
        """Take steps; the seconds that they took."""
        began = time.perf_counter()
        for _ in range(count):
            self.trainer.learn(*self.batches[self.trainer.step % len(self.batches)])
        return time.perf_counter() - began


def memory(case: dict[str, Any], store: str) -> float:
    """Memory that ten steps take beyond data and parameters, MiB; for a process of its own."""
    steps = Steps(case, ActivationStore.open(store))
    mib = extra_mib(lambda: steps.take(10))
    steps.close()
    return mib


def loader(folder: str, batch: int) -> float:
    """Memory that an epoch through a store takes, in shards; for a process of its own."""
    store = ActivationStore.open(folder)
    hooks = store.hooks
    shard = store.shards("train")[0].rows * sum(store.widths[hook] for hook in hooks) * store.dtype.itemsize / 2**20
    with Batches(store, hooks, batch) as first:
        first.at(0)  # What libraries take once.

    def through() -> None:
        with Batches(store, hooks, batch) as batches:
            for step in range(int(batches.steps_per_epoch) + 1):
                batches.at(step)

    return extra_mib(through) / shard


if __name__ == "__main__":
    functions: dict[str, Callable[..., float]] = {"memory": memory, "loader": loader}
    print(functions[sys.argv[1]](**json.loads(sys.argv[2])))

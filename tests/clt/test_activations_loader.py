"""Batches: the same rows of each hook point, each once an epoch, from any step."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.clt.activations import store as stores
from services.clt.activations.loader import Batches, everything
from services.clt.activations.store import (
    SPLITS,
    TRAIN,
    VALIDATION,
    ActivationStore,
    Hook,
    Instances,
    Manifest,
    Source,
    Writer,
)


def write_store(folder: Path, instances: int, each: int, width: int, shard_instances: int) -> ActivationStore:
    """Two hook points: ``a`` begins with instance and position, ``b`` has the negative of ``a``."""
    manifest = Manifest(
        source=Source(kind="policy", digest="0", name="none"),
        spec={},
        seed=0,
        dtype="float16",
        hooks=[Hook(name="a", width=width), Hook(name="b", width=width)],
        pairs=[],
        rows_per_instance=each,
        first_position=0,
        shard_instances=shard_instances,
        instances=Instances(total=instances, validation=instances // 10, drawn="the first"),
    )
    with Writer.open(folder, manifest) as writer:
        start = 0
        for split in reversed(SPLITS):
            while (room := min(writer.room(split), 512)) > 0:
                ids = torch.arange(start, start + room)
                rows = torch.randn(room, each, width, generator=torch.Generator().manual_seed(start))
                rows[..., 0], rows[..., 1] = ids[:, None].half().float(), torch.arange(each).float()
                writer.add(split, ids, {"a": rows, "b": -rows})
                start += room
        return writer.finish()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Seven shards of 40 training rows and one of 10."""
    return write_store(tmp_path_factory.mktemp("store"), 64, 5, 3, 8)


def rows_of(tensor: Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in tensor.tolist()]


@pytest.mark.parametrize("size", [7, 40, 64, 290, 700])
@pytest.mark.parametrize("split", SPLITS)
def test_an_epoch_has_each_row_once_and_batches_are_full(store: ActivationStore, size: int, split: str) -> None:
    whole = rows_of(everything(store, ["a"], split)[0])
    steps = 3 * len(whole) // size + 1
    with Batches(store, ["a", "b"], size, split, 5) as batches:
        found = [batches.at(step) for step in range(steps)]
    assert all(len(batch[0]) == size and batch[0].dtype == torch.float32 for batch in found)
    assert all(torch.equal(a, -b) for a, b in found)
    stream = rows_of(torch.cat([batch[0] for batch in found]))
    epochs = [stream[start : start + len(whole)] for start in range(0, len(stream), len(whole))]
    full = [epoch for epoch in epochs if len(epoch) == len(whole)]
    assert full and all(sorted(epoch) == sorted(whole) for epoch in full)
    assert all(epoch != whole for epoch in full)
    assert len({tuple(epoch) for epoch in full}) == len(full)


def test_batches_are_the_same_from_any_step_in_any_order(store: ActivationStore) -> None:
    with Batches(store, ["b", "a"], 33, seed=2) as batches:
        straight = [batches.at(step) for step in range(30)]
    for prefetch in (True, False):
        for start in range(0, 30, 4):
            with Batches(store, ["b", "a"], 33, seed=2, prefetch=prefetch) as batches:
                for step in range(start, min(start + 5, 30)):
                    assert all(map(torch.equal, batches.at(step), straight[step]))
    with Batches(store, ["b", "a"], 33, seed=2) as batches:
        for step in (29, 3, 3, 17, 0, 1, 28):
            assert all(map(torch.equal, batches.at(step), straight[step]))
    with Batches(store, ["a"], 33, seed=3) as batches:
        assert not torch.equal(batches.at(0)[0], straight[0][1])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_have_the_parts_of_a_batch(store: ActivationStore, size: int) -> None:
    with Batches(store, ["a"], 33, seed=2) as batches:
        for step in (0, 8):
            parts = [batches.at(step, rank, size)[0] for rank in range(size)]
            assert torch.equal(torch.cat(parts), batches.at(step)[0])


def test_rows_of_different_shards_are_mixed(store: ActivationStore) -> None:
    shard_of = {
        row: number
        for number in range(len(store.shards(TRAIN)))
        for row in rows_of(store.read(TRAIN, number, ["a"])[0].float())
    }
    with Batches(store, ["a"], 30) as batches:
        assert len({shard_of[row] for row in rows_of(batches.at(0)[0])}) > 1


def test_nothing_is_left_open(store: ActivationStore) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208

    before = held()
    for _ in range(3):
        with Batches(store, ["a", "b"], 64) as batches:
            for step in range(9):
                batches.at(step)
    assert held() == before


def test_what_goes_wrong_in_the_thread_is_told(tmp_path: Path) -> None:
    store = write_store(tmp_path, 64, 5, 3, 8)
    for shard in store.shards(TRAIN):
        path = tmp_path / shard.file
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        stores._verified.discard((str(path.resolve()), shard.sha256))
    with Batches(store, ["a"], 10) as batches, pytest.raises(InvalidInput, match="not have the bytes"):
        batches.at(0)


def test_hook_points_and_splits_that_are_not_there(store: ActivationStore) -> None:
    with pytest.raises(InvalidInput, match="hooks: the store has no c; there are a, b"):
        Batches(store, ["c"], 8)
    none = ActivationStore(store.folder, store.manifest.model_copy(update={"splits": {TRAIN: [], VALIDATION: []}}))
    with pytest.raises(InvalidInput, match="no train rows"):
        Batches(none, ["a"], 8)


def test_everything_is_in_the_order_of_the_files(store: ActivationStore) -> None:
    whole = everything(store, ["a", "b"], TRAIN)
    parts = [store.read(TRAIN, number, ["a"])[0] for number in range(len(store.shards(TRAIN)))]
    assert torch.equal(whole[0], torch.cat(parts).float()) and torch.equal(whole[0], -whole[1])
    assert torch.equal(everything(store, ["a"], TRAIN, 45)[0], whole[0][:45])
    assert len(everything(store, ["a"], TRAIN, 10**6)[0]) == len(whole[0])


MEASURE = """
import sys, time
from pathlib import Path
from services.clt.activations.loader import Batches
from services.clt.activations.store import ActivationStore
store = ActivationStore.open(sys.argv[1])
store.check(verify=True)
def memory(name):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(name + ":")[2].split()[0]) * 1024
store.read("train", 0, ["instance"])
before = memory("VmRSS")
# The most there was, from now on.
Path("/proc/self/clear_refs").write_text("5")
with Batches(store, ["a", "b"], 512, prefetch=sys.argv[2] == "1") as batches:
    begin = time.perf_counter()
    steps = 4 * store.rows() // 512
    for step in range(steps):
        batches.at(step)
    seconds = time.perf_counter() - begin
print(memory("VmHWM") - before, int(steps * 512 / seconds))
"""


def test_memory_is_that_of_two_shards(tmp_path: Path) -> None:
    # Eight shards of 8 MB.
    store = write_store(tmp_path, 9102, 8, 256, 1024)
    assert len(store.shards(TRAIN)) == 8
    asked = [sys.executable, "-c", MEASURE, str(tmp_path), "1"]
    answer = subprocess.run(asked, check=True, capture_output=True, text=True, env=dict(os.environ))
    grown, rate = map(int, answer.stdout.split())
    shard = max(shard.bytes for shard in store.shards(TRAIN))
    # Beside it what Python itself takes meanwhile.
    assert grown < 2 * shard + 2e6, f"{grown / shard:.1f} shards"
    assert rate > 10_000

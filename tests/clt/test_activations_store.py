"""Stores: what is recorded, what an interruption leaves, and what is found to be wrong."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec
from services.clt.activations import job, store
from services.clt.activations.collect import ROOT, collect, plan
from services.clt.activations.hooks import capture, policy_points
from services.clt.activations.sources import CHUNK, open_source
from services.clt.activations.store import MANIFEST, STATISTICS, TRAIN, VALIDATION, ActivationStore
from services.clt.policy.tsp import instances
from services.runtime.run import Run, Stopped
from services.runtime.seeds import generator
from services.runtime.tensors import write_durably
from tests.clt.test_activations_hooks import small_policy
from tests.recorder import Recorder

HOOKS = ["encoder_layer_0", "encoder_output", "decoder_input"]


def small_spec(**changes: Any) -> ActivationsSpec:
    """Enough for 19 shards of 26 rows or so."""
    fields: dict[str, Any] = {"policy": ArtifactRef(artifact="policy"), "instances": 100, "validation": 0.17}
    fields |= {"hooks": HOOKS, "shard_rows": 32, "batch_size": 7, "seed": 3} | changes
    return ActivationsSpec.model_validate(fields)


def every(found: ActivationStore, split: str, *names: str) -> list[Tensor]:
    """All rows of a split."""
    shards = [found.read(split, number, names) for number in range(len(found.shards(split)))]
    return [torch.cat(parts) for parts in zip(*shards, strict=True)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


def test_a_store_has_the_activations_of_each_instance_once(tmp_path: Path) -> None:
    policy, spec = small_policy(), small_spec(hooks=[], pairs=["encoder_layer_0->encoder_output"], dtype="float32")
    made = collect(spec, tmp_path / "store", Run(), policy)
    found = ActivationStore.open(tmp_path / "store")
    assert found.digest == made.digest
    assert found.widths == {"encoder_layer_0": 16, "encoder_output": 16}
    assert found.manifest.complete and found.manifest.pairs == [("encoder_layer_0", "encoder_output")]
    assert (found.rows(TRAIN), found.rows(VALIDATION)) == (83 * 6, 17 * 6)
    assert {shard.rows for shard in found.shards(TRAIN)} == {30, 83 * 6 % 30}

    parts = [every(found, split, *found.hooks, "instance", "position") for split in (TRAIN, VALIDATION)]
    train, validation = (set(part[2].tolist()) for part in parts)
    assert not train & validation
    assert train | validation == set(range(100))
    first, output, instance, position = (torch.cat(pair) for pair in zip(*parts, strict=True))
    assert sorted(zip(instance.tolist(), position.tolist(), strict=True)) == [
        (i, j) for i in range(100) for j in range(6)
    ]

    cities = instances(CHUNK, 6, generator(3, "instances", 0))[:100]
    with capture(policy, [policy_points(policy)[name] for name in found.hooks]) as by_hand:
        policy.decoder.memory(policy.encoder(cities))
    for name, rows in (("encoder_layer_0", first), ("encoder_output", output)):
        torch.testing.assert_close(rows, by_hand[name][instance.long(), position.long()], rtol=1e-4, atol=1e-5)
    # Neighbours come from all over their block.
    assert len(set(parts[0][2][:30].tolist())) > 10
    found.require(policy.digest)
    found.check(verify=True)
    with pytest.raises(InvalidInput, match="not of the model asked for"):
        found.require(small_policy(1).digest)


def test_statistics_are_those_of_the_training_rows(tmp_path: Path) -> None:
    found = collect(small_spec(), tmp_path, Run(), small_policy())
    for hook in HOOKS:
        rows = every(found, TRAIN, hook)[0].double().numpy()
        known = found.statistics(hook)
        assert known.rows == len(rows) and known.covariance is not None
        np.testing.assert_allclose(known.mean.numpy(), rows.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(known.std.numpy(), rows.std(0), rtol=1e-9)
        np.testing.assert_allclose(known.covariance.numpy(), np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)
        assert known.square_norm == pytest.approx((rows**2).sum(1).mean())
        assert known.norm == pytest.approx(np.linalg.norm(rows, axis=1).mean())
        assert known.zeros == pytest.approx((rows == 0).mean())
    changed = {name: 3 * tensor for name, tensor in load_file(tmp_path / STATISTICS).items()}
    for broken in (b"", (tmp_path / STATISTICS).read_bytes()[:-9], save(changed), None):
        (tmp_path / STATISTICS).unlink() if broken is None else (tmp_path / STATISTICS).write_bytes(broken)
        again = ActivationStore.open(tmp_path).statistics(HOOKS[0])
        assert torch.equal(again.mean, found.statistics(HOOKS[0]).mean)


def test_wide_shards_have_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, width = small_policy(), (16 + 16 + 48) * 2
    monkeypatch.setattr("services.clt.activations.collect.SHARD_BYTES", 20 * width)
    found = collect(small_spec(), tmp_path, Run(), policy)
    assert found.manifest.shard_instances * found.manifest.rows_per_instance == 18
    monkeypatch.setattr("services.clt.activations.collect.SHARD_BYTES", 1)
    assert plan(small_spec(), open_source(small_spec(), "cpu", policy), Run())[1].shard_instances == 1


def full_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: Callable[[], BaseException]) -> None:
    """The disk takes so many shards, and then what is written fails half way."""
    left = [shards]

    def fails(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
        if path.name.startswith(("train", "validation")):
            left[0] -= 1
        if left[0] >= 0:
            return write_durably(path, parts)

        def half() -> Iterable[bytes | memoryview]:
            yield next(iter(parts))
            raise error()

        return write_durably(path, half())

    monkeypatch.setattr(store, "write_durably", fails)


def full() -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("shards", [0, 1, 3, 4, 6, 13, 18])
def test_a_full_disk_leaves_what_fits_and_the_rest_is_the_same_later(
    shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, policy = small_spec(), small_policy()
    collect(spec, tmp_path / "whole", Run(), policy)
    with monkeypatch.context() as patch:
        full_after(patch, shards, full)
        with pytest.raises(Unavailable, match=r"no space left; \d+ training and \d+ validation rows are kept") as told:
            collect(spec, tmp_path / "cut", Run(), policy)
    assert not list((tmp_path / "cut").glob("*.new"))
    if shards:
        kept = ActivationStore.open(tmp_path / "cut")
        assert not kept.manifest.complete
        assert f"{kept.rows(TRAIN)} training and {kept.rows(VALIDATION)} validation" in str(told.value)
        assert sum(len(kept.shards(split)) for split in (TRAIN, VALIDATION)) == shards
        kept.check(verify=True)
        if kept.rows(TRAIN):
            rows = every(kept, TRAIN, HOOKS[0])[0].double()
            torch.testing.assert_close(kept.statistics(HOOKS[0]).mean, rows.mean(0))
    collect(spec, tmp_path / "cut", Run(), policy)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    # There is nothing left to do.
    before = (tmp_path / "cut" / MANIFEST).stat().st_mtime_ns
    collect(spec, tmp_path / "cut", Run(), policy)
    assert (tmp_path / "cut" / MANIFEST).stat().st_mtime_ns == before


def test_many_chunks_are_gone_on_with_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy(nodes=4)
    spec = small_spec(instances=2500, shard_rows=1000, batch_size=64, hooks=HOOKS[:1], validation=0.07)
    collect(spec, tmp_path / "whole", Run(), policy)
    with monkeypatch.context() as patch:
        full_after(patch, 9, full)
        with pytest.raises(Unavailable):
            collect(spec, tmp_path / "cut", Run(), policy)
    collect(spec, tmp_path / "cut", Run(), policy)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("after", [1, 50, 90])
def test_a_job_goes_on_from_its_checkpoint(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOT, raising=False)
    small_policy().save(tmp_path / "policy")
    inputs = {"policy": tmp_path / "policy"}
    run = Recorder(tmp_path / "whole", inputs=inputs)
    result = job.run(small_spec(), run)
    json.dumps(result, allow_nan=False)
    assert result["figures"]["rows"] == {TRAIN: 83 * 6, VALIDATION: 17 * 6}
    assert result["figures"]["instances"] == 100
    assert result["figures"]["hooks"]["decoder_input"]["width"] == 48
    assert run.artifacts == [("activations", "activations")]
    first = Recorder(tmp_path / "first", inputs=inputs, keep=after, stop_after=1)
    with pytest.raises(Stopped):
        job.run(small_spec(), first)
    second = Recorder(tmp_path / "second", inputs=inputs, resume=first.checkpoints[0])
    assert job.run(small_spec(), second) == result
    assert contents(tmp_path / "second" / "activations") == contents(tmp_path / "whole" / "activations")


def test_a_root_outside_keeps_the_store_and_the_artifact_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROOT, str(tmp_path / "disk"))
    small_policy().save(tmp_path / "policy")
    job.run(small_spec(), Recorder(tmp_path / "run", inputs={"policy": tmp_path / "policy"}))
    artifact = tmp_path / "run" / "activations"
    assert [file.name for file in artifact.iterdir()] == ["activation_store.json"]
    found = ActivationStore.open(artifact)
    assert found.folder.parent == tmp_path / "disk" and found.rows(TRAIN) == 83 * 6
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(InvalidInput, match=f"activations: the store was kept in {found.folder}, which is gone"):
        ActivationStore.open(artifact)


def test_a_root_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root, parent in (("~/disk", tmp_path / "home" / "disk"), ("disk", tmp_path / "disk"), ("", tmp_path / "run")):
        monkeypatch.setenv(ROOT, root)
        assert collect(small_spec(), tmp_path / "run" / "store", Run(), small_policy()).folder.parent == parent
    monkeypatch.setenv(ROOT, "~nobody-at-all/disk")
    with pytest.raises(InvalidInput, match=r"ACTIVATIONS_ROOT: ~nobody-at-all/disk begins with ~, but"):
        collect(small_spec(), tmp_path / "new", Run(), small_policy())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("~")]


def test_shards_that_are_cut_off_corrupt_or_gone_are_named(tmp_path: Path) -> None:
    collect(small_spec(), tmp_path, Run(), small_policy())
    shard = tmp_path / "train-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    found = ActivationStore.open(tmp_path)
    found.read(TRAIN, 1, HOOKS)
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"train-00002\.safetensors: .*not have the bytes"):
            found.read(TRAIN, 2, HOOKS[:1])
    with pytest.raises(InvalidInput, match=r"train-00002\.safetensors"):
        found.check(verify=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(InvalidInput, match=r"train-00002\.safetensors: .*cut off"):
        ActivationStore.open(tmp_path)
    shard.unlink()
    with pytest.raises(InvalidInput, match=r"train-00002\.safetensors: is missing"):
        ActivationStore.open(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(InvalidInput, match=r"manifest\.json"):
        ActivationStore.open(tmp_path)
    with pytest.raises(InvalidInput, match=r"manifest\.json: .*other does not exist"):
        ActivationStore.open(tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(InvalidInput, match=r"manifest\.json: is missing"):
        ActivationStore.open(tmp_path / "other")


def test_a_store_of_another_policy_or_spec_is_not_gone_on_with(tmp_path: Path) -> None:
    collect(small_spec(), tmp_path, Run(), small_policy())
    before = contents(tmp_path)
    with pytest.raises(InvalidInput, match="another model"):
        collect(small_spec(), tmp_path, Run(), small_policy(1))
    with pytest.raises(InvalidInput, match=r"another spec \(spec\.instances\)"):
        collect(small_spec(instances=101), tmp_path, Run(), small_policy())
    assert contents(tmp_path) == before


def test_one_process_writes_a_store_at_a_time(tmp_path: Path) -> None:
    made = collect(small_spec(), tmp_path, Run(), small_policy())
    with store.Writer.open(tmp_path, made.manifest), pytest.raises(Unavailable, match="another process"):
        store.Writer.open(tmp_path, made.manifest).__enter__()


def test_numbers_that_are_not_finite_are_told_of_with_their_hook(tmp_path: Path) -> None:
    policy = small_policy()
    policy.decoder.project.weight.mul_(1e6)
    with pytest.raises(InvalidInput, match=r"decoder_input .* not finite in float16; set dtype"):
        collect(small_spec(), tmp_path / "half", Run(), policy)
    collect(small_spec(dtype="bfloat16"), tmp_path / "bfloat", Run(), policy)
    policy.decoder.project.weight.fill_(float("nan"))
    with pytest.raises(InvalidInput, match=r"decoder_input .* not finite"):
        collect(small_spec(dtype="float32"), tmp_path / "nan", Run(), policy)


def test_too_few_instances_for_both_splits(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"spec\.instances: .*leave none for training"):
        collect(small_spec(instances=1), tmp_path, Run(), small_policy())

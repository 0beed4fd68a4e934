"""A batch in parts, and in parts on several processes, gives the very gradients of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ethogram.errors import InvalidInput, Unavailable
from services.crossmodal.train import CodecTrainer, micro_batches
from services.runtime.devices import chosen_device, launch
from services.runtime.parallel import World, join
from services.zoo.dataset import Zoo
from tests.crossmodal.conftest import tiny_spec

# Nothing that is drawn differs by the part: reconstruction alone, of the same subjects.
PLAIN = {"gamma": 0.0, "reconstruction": 1.0, "behavior": 0.0, "steering": 0.0, "direct": 0.0}


def test_accumulated_parts_equal_the_whole_batch(zoo: Zoo) -> None:
    whole, parts = (CodecTrainer(tiny_spec(loss=PLAIN, training={"accumulation": n}), zoo) for n in (1, 5))
    for _ in range(3):
        one, two = whole.advance(), parts.advance()
        torch.testing.assert_close(one["loss"], two["loss"])
    # Adam divides by the gradient's own size, so rounding shows where there is hardly any gradient.
    for mine, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_parts_keep_buddies_together() -> None:
    batch = torch.arange(22)
    parts = micro_batches(batch, 4)
    assert torch.equal(torch.cat(parts), batch)
    assert [len(part) for part in parts] == [6, 6, 6, 4]


def test_a_part_without_a_pair_is_refused(zoo: Zoo) -> None:
    CodecTrainer(tiny_spec(training={"batch_size": 8, "accumulation": 2}), zoo, world=World(1, 2))
    with pytest.raises(InvalidInput, match="4 pairs of subjects, too few for 6 parts") as caught:
        CodecTrainer(tiny_spec(training={"batch_size": 8, "accumulation": 3}), zoo, world=World(1, 2))
    assert caught.value.violations[0].field == "spec.training.batch_size"


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize(
    ("asked", "backend", "device"), [(None, "nccl", "cuda:1"), ("cuda", "nccl", "cuda:1"), ("cpu", "gloo", "cpu")]
)
def test_processes_talk_as_their_device_can(
    asked: str | None, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", done.append)
    assert join(asked) == (World(0, 2), device)
    assert done == [*([device] if backend == "nccl" else []), backend]


@pytest.mark.usefixtures("torchrun")
def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="--device: cuda:1 is one device for 2 processes; say cuda"):
        join("cuda:1")
    monkeypatch.delenv("WORLD_SIZE")
    assert join("cuda:1") == (World(), "cuda:1")


@pytest.mark.parametrize(
    "there",
    [
        ["WORLD_SIZE"],
        ["RANK", "LOCAL_RANK"],
        ["MASTER_ADDR", "MASTER_PORT"],
        ["WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"],
    ],
)
def test_a_part_of_torchruns_variables_is_one_process(
    there: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Schedulers and notebooks set some of them."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name in there:
        monkeypatch.setenv(name, TORCHRUN[name])
    assert launch() == (1, 0, 0)
    assert join("cpu") == (World(), "cpu")
    assert ("computes alone" in caplog.text) == ("WORLD_SIZE" in there)
    assert chosen_device("cpu") == "cpu"


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE: 'two' is not a number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: '0' is not a number"),
        ("RANK", "-1", "RANK: '-1' is not a number"),
        ("RANK", "2", "RANK: 2 is not below WORLD_SIZE, 2"),
        ("LOCAL_RANK", "1.5", "LOCAL_RANK: '1.5' is not a number"),
        ("MASTER_PORT", "http", r"127\.0\.0\.1:http \(MASTER_ADDR, MASTER_PORT\)"),
    ],
)
def test_a_wrong_variable_of_torchrun_is_named(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises((InvalidInput, Unavailable), match=said):
        join("cpu")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_train_the_codec_of_one(zoo: Zoo, tmp_path: Path) -> None:
    """By torchrun and gloo: the same codec as one process that does both parts, and one report."""
    zoo.save(tmp_path / "zoo")
    base = tiny_spec(training={"steps": 4, "validate_every": 2}).model_dump(exclude={"zoo"})
    for name, parts in (("one", 2), ("two", 1)):
        spec = {**base, "training": {**base["training"], "accumulation": parts}}
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    train = ["-m", "services.crossmodal", "train", str(tmp_path / "zoo")]
    alone = [sys.executable, *train]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *train]
    for name, command in (("one", alone), ("two", together)):
        options = ["-f", str(tmp_path / f"{name}.json"), "-o", str(tmp_path / name), "--device", "cpu"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("remove.all_gate") == 1
    for file in ("encoder", "decoder", "directions"):
        mine, theirs = (load_file(tmp_path / name / "codec" / f"{file}.safetensors") for name in ("one", "two"))
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4, msg=f"{file} {key}")

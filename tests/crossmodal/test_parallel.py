"""A batch in parts, and in parts on several processes, gives the very gradients of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.crossmodal.train import Trainer, micro_batches
from services.zoo.dataset import Zoo
from tests.crossmodal.conftest import tiny_spec

# Nothing that is drawn differs by the part: reconstruction alone, of the same subjects.
PLAIN = {"gamma": 0.0, "reconstruction": 1.0, "behavior": 0.0, "steering": 0.0, "direct": 0.0}


def test_accumulated_parts_equal_the_whole_batch(zoo: Zoo) -> None:
    whole, parts = (Trainer(tiny_spec(loss=PLAIN, training={"accumulation": n}), zoo) for n in (1, 5))
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
    assert [len(part) for part in micro_batches(torch.arange(4), 9)] == [2, 2]


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
        assert done.stdout.count("agreement_balanced") == 1
    for file in ("encoder", "decoder", "directions"):
        mine, theirs = (load_file(tmp_path / name / "codec" / f"{file}.safetensors") for name in ("one", "two"))
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4, msg=f"{file} {key}")

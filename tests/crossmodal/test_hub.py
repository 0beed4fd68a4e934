"""Codecs on a Hub: a local server that speaks what the Hugging Face Hub speaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.base import HubSpec
from services.crossmodal.codec import Codec
from services.crossmodal.hub import pull, push
from services.crossmodal.job import run as run_job
from services.zoo.dataset import Zoo
from services.zoo.subjects import flatten
from tests.crossmodal.conftest import tiny_spec
from tests.hub_server import Hub, reach, serve
from tests.recorder import Recorder

MINE = HubSpec(repo="me/codec")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        reach(hub.url, monkeypatch, tmp_path / "cache")
        yield hub


def test_a_job_uploads_its_codec_and_each_part_loads_alone(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    zoo.save(tmp_path / "zoo")
    recorder = Recorder(tmp_path, inputs={"zoo": tmp_path / "zoo"})
    run_job(tiny_spec(training={"steps": 1}, hub={"repo": "me/codec"}), recorder)
    networks = {name: tensor[:2] for name, tensor in zoo.params.items()}
    edits = [("add", "has_majority")]
    whole = Codec.load(pull("me/codec"))
    _, latents = whole.steer(networks, edits)
    encoder = Codec.load(pull("me/codec", ["encoder"]), parts=["encoder"])
    assert torch.equal(encoder.encode(networks), whole.encode(networks))
    with pytest.raises(InvalidInput, match="without its decoder"):
        encoder.steer(networks, edits)
    decoder = Codec.load(pull("me/codec", ["decoder"]), parts=["decoder"])
    assert torch.equal(flatten(decoder.decode(latents)), flatten(whole.decode(latents)))
    with pytest.raises(InvalidInput, match="without its encoder"):
        decoder.encode(networks)
    assert b"has_majority" in hub.repos["me/codec"]["README.md"]


def test_no_permission_is_told_before_any_training(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    zoo.save(tmp_path / "zoo")
    with pytest.raises(InvalidInput) as caught:
        run_job(tiny_spec(hub={"repo": "you/codec"}), Recorder(tmp_path, inputs={"zoo": tmp_path / "zoo"}))
    assert caught.value.violations[0].field == "spec.hub.repo"
    with pytest.raises(InvalidInput, match="no permission to read"):
        pull("me/nothing")


def test_no_hub_is_told(zoo: Zoo, untrained: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach("http://127.0.0.1:9", monkeypatch, tmp_path / "cache")
    untrained.save(tmp_path / "codec")
    with pytest.raises(Unavailable, match="cannot be reached"):
        push(tmp_path / "codec", MINE)


def test_parts_of_different_runs_are_refused(untrained: Codec, zoo: Zoo, tmp_path: Path) -> None:
    from services.crossmodal.train import CodecTrainer

    untrained.save(tmp_path / "one")
    CodecTrainer(tiny_spec(seed=5), zoo).codec().save(tmp_path / "two")
    (tmp_path / "one" / "decoder.safetensors").write_bytes((tmp_path / "two" / "decoder.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match="of another run") as caught:
        Codec.load(tmp_path / "one")
    assert caught.value.violations[0].field == "decoder.safetensors"
    Codec.load(tmp_path / "one", parts=["encoder"])
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["run"] != json.loads((tmp_path / "one" / "config.json").read_text())["run"]

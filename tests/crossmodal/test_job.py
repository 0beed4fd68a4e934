"""The job: what it keeps and what it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.crossmodal import job
from services.crossmodal.codec import Codec
from services.crossmodal.job import run as run_job
from services.zoo.dataset import Zoo
from services.zoo.subjects import flatten
from tests.crossmodal.conftest import tiny_spec
from tests.recorder import Recorder


@pytest.mark.pictures
def test_job_keeps_a_codec_and_a_report(zoo: Zoo, tmp_path: Path) -> None:
    zoo.save(tmp_path / "zoo")
    recorder = Recorder(tmp_path, inputs={"zoo": tmp_path / "zoo"})
    result = run_job(tiny_spec(), recorder)
    assert recorder.artifacts == [("codec", "codec"), ("report", "report")]
    assert recorder.stage_names == ["train", "evaluate"]
    assert set(recorder.metrics[6]) == {"loss", "reconstruction", "behavior", "contrastive", "steering", "direct"}
    json.dumps(result, allow_nan=False)

    codec, report = Codec.load(tmp_path / "codec"), tmp_path / "report"
    for picture in ("history.png", "latent_map.png", "steering.png"):
        assert (report / picture).read_bytes().startswith(b"\x89PNG")
    written = json.loads((report / "report.json").read_text())
    assert written["figures"] == result["figures"]

    # The steered weights are what the codec makes of the sources, in the order of the examples.
    tensors = load_file(report / "steered.safetensors")
    examples = written["examples"]
    assert len(examples) == len(tensors["source.layers.0.weight"]) > 4
    i = len(examples) - 1
    source, steered = (
        {k.removeprefix(side): v[i : i + 1] for k, v in tensors.items() if k.startswith(side)}
        for side in ("source.", "steered.")
    )
    position = zoo.index.tolist().index(int(zoo.index[examples[i]["subject"]]))
    assert torch.equal(source["layers.0.weight"][0], zoo.params["layers.0.weight"][position])
    edit = examples[i]["edit"]
    again, _ = codec.steer(source, [(edit["operation"], edit["behavior"])])
    torch.testing.assert_close(flatten(again), flatten(steered))


def test_a_failing_evaluation_costs_no_codec(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(job, "evaluate", fails)
    zoo.save(tmp_path / "zoo")
    with pytest.raises(ZeroDivisionError):
        run_job(tiny_spec(training={"steps": 1}), Recorder(tmp_path, inputs={"zoo": tmp_path / "zoo"}))
    assert Codec.load(tmp_path / "codec").zoo == zoo.digest


def test_one_held_out_subject_is_enough_for_a_report(zoo: Zoo, tmp_path: Path) -> None:
    zoo.save(tmp_path / "zoo")
    result = run_job(
        tiny_spec(held_out=0.001, training={"steps": 1}), Recorder(tmp_path, inputs={"zoo": tmp_path / "zoo"})
    )
    assert result["subjects"] == {"train": len(zoo) - 9, "held_out": 1}
    json.dumps(result, allow_nan=False)
    # There is no distance between one.
    assert "spread" not in result["figures"]

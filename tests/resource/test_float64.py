"""Jobs of the resource system on a device without float64, which Apple's GPUs are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.resource import job, language_model
from services.resource.decoder import job as decoder_job
from services.resource.language_model import LanguageModelTrainer
from services.runtime.training import fit
from tests.fake_device import fake_mps
from tests.recorder import Recorder
from tests.resource.conftest import tiny_decoder_spec, tiny_reader_spec, tiny_spec

REF = {"artifact": "x"}


@pytest.mark.filterwarnings("ignore:at..frobenius_norm:UserWarning")
def test_jobs_compute_without_float64(tables: Path, language_folder: Path, tmp_path: Path) -> None:
    inputs = {"tools": tables, "profiling": tables, "language_model": language_folder}
    trainer = Recorder(tmp_path / "trainer", inputs=inputs)
    decoder = Recorder(tmp_path / "decoder", inputs={"export": tmp_path / "trainer" / "export"})
    with fake_mps() as device:
        trainer.device = decoder.device = device
        results = [job.run(tiny_spec(**dict.fromkeys(inputs, REF), held_out=0), trainer)]
        results.append(decoder_job.run(tiny_decoder_spec(), decoder))
    json.dumps(results, allow_nan=False)
    names = [name for run in (trainer, decoder) for name, _ in run.artifacts]
    assert names == ["encoder", "export", "report", "decoder", "report"]


def test_the_default_language_model_is_trained_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "_CORPUS", 10)
    with fake_mps() as device:
        trainer = LanguageModelTrainer(tiny_reader_spec(), device)
        fit(trainer)
    assert trainer.step == 2 and trainer.progress.lowest < 100

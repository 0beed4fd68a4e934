"""Encoders and exports on a Hub: a local server that speaks what the Hugging Face Hub speaks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.base import HubSpec
from services.language.models import load_language_model
from services.resource import job
from services.resource.codec import ResourceCodec
from services.resource.export import export, validate
from services.resource.hub import pull, push
from services.resource.job import run as run_job
from tests.hub_server import Hub, reach, serve
from tests.recorder import Recorder
from tests.resource.conftest import tiny_spec
from tests.tiny_encoder import ROWS, random_encoder, save_characters

REF = {"artifact": "x"}
INPUTS = {"tools": REF, "profiling": REF, "language_model": REF}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        reach(hub.url, monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with an encoder and its export, as a run has them."""
    codec = random_encoder(save_characters(tmp_path / "language"))
    assert codec.table is not None
    codec.save(tmp_path / "run" / "encoder")
    export(codec, codec.table, tmp_path / "run" / "export")
    return tmp_path / "run"


def test_a_job_uploads_its_default_language_model(
    hub: Hub, tables: Path, language_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "default_folder", lambda run: language_folder)
    recorder = Recorder(tmp_path, inputs={"tools": tables, "profiling": tables})
    run_job(tiny_spec(tools=REF, profiling=REF, hub={"repo": "me/vectors"}, held_out=0), recorder)
    assert recorder.artifacts[0] == ("language_model", "language-model")
    folder = pull("me/vectors")
    codec = ResourceCodec.load(folder / "encoder")
    assert b"`language_model/` holds" in hub.repos["me/vectors"]["README.md"]
    assert load_language_model(str(folder / "language_model")).digest == codec.about["language_model_digest"]


def test_a_job_uploads_its_encoder_and_export(hub: Hub, tables: Path, language_folder: Path, tmp_path: Path) -> None:
    inputs = {"tools": tables, "profiling": tables, "language_model": language_folder}
    recorder = Recorder(tmp_path, inputs=inputs)
    run_job(tiny_spec(**INPUTS, hub={"repo": "me/vectors"}, held_out=0), recorder)
    folder = pull("me/vectors")
    first, again = (ResourceCodec.load(place / "encoder") for place in (tmp_path, folder))
    assert first.table is not None and again.table is not None
    assert torch.equal(again.embed(again.table.values), first.embed(first.table.values))
    assert torch.equal(validate(folder / "export").weights, validate(tmp_path / "export").weights)
    assert b"detect, translate" in hub.repos["me/vectors"]["README.md"]


def test_parts_are_pulled_alone_and_an_encoder_needs_no_export(hub: Hub, made: Path) -> None:
    push(made / "encoder", None, HubSpec(repo="me/encoder"))
    assert not any(name.startswith("export/") for name in hub.repos["me/encoder"])
    card = hub.repos["me/encoder"]["README.md"].decode()
    assert "36\nmeasurements" in card and "`export/`" not in card and str(made.parent) not in card
    push(made / "encoder", made / "export", HubSpec(repo="me/both"))
    assert {path.name for path in pull("me/both", ["export"]).iterdir() if not path.name.startswith(".")} == {"export"}
    codec = ResourceCodec.load(pull("me/both") / "encoder")
    assert codec.embed(*codec.vectors(ROWS)).shape == (3, 32)


def test_what_is_wrong_is_told_before_anything_is_uploaded(hub: Hub, made: Path) -> None:
    with pytest.raises(InvalidInput, match=r"encoder\.json: is missing"):
        push(made / "export", None, HubSpec(repo="me/nothing"))
    (made / "export" / "config_lookup.json").write_text("{}")
    with pytest.raises(InvalidInput, match="was changed since the export"):
        push(made / "encoder", made / "export", HubSpec(repo="me/nothing"))
    assert not hub.repos
    with pytest.raises(InvalidInput, match="no permission") as caught:
        push(made / "encoder", None, HubSpec(repo="you/encoder"), "REPO")
    assert caught.value.violations[0].field == "REPO"
    with pytest.raises(InvalidInput, match="no permission to read"):
        pull("me/nothing")


def test_no_permission_and_no_hub_are_told_before_any_training(
    hub: Hub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput) as caught:
        run_job(tiny_spec(**INPUTS, hub={"repo": "you/encoder"}), Recorder(tmp_path))
    assert caught.value.violations[0].field == "spec.hub.repo"
    reach("http://127.0.0.1:9", monkeypatch, tmp_path / "other-cache")
    with pytest.raises(Unavailable, match="cannot be reached"):
        push(made / "encoder", None, HubSpec(repo="me/encoder"))


def test_the_command_line_pushes_a_run_and_pulls_it(
    hub: Hub, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from services.resource.__main__ import app

    shutil.copytree(tmp_path / "language", made / "language_model")
    for arguments in (["push", str(made), "me/mine", "--public"], ["pull", "me/mine", "-o", str(tmp_path / "copy")]):
        app(arguments, standalone_mode=False)
    assert not hub.private["me/mine"]
    for name in ("encoder", "export", "language_model"):
        mine, copy = made / name, tmp_path / "copy" / name
        assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
            file.name: file.read_bytes() for file in mine.iterdir()
        }
    # As the folder of a run is.
    app(["validate", str(tmp_path / "copy"), "--json"], standalone_mode=False)

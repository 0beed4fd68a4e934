"""``python -m services.crossmodal train``, as it is typed, on zoos from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from ethogram.cli.output import execute
from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from services.crossmodal import __main__ as command
from services.crossmodal import job
from services.crossmodal.codec import Codec
from services.crossmodal.train import train
from services.generation.json_form import export_json
from services.runtime import local
from services.runtime.console import ConsoleRun
from services.runtime.folders import RunFolder
from services.zoo.dataset import Zoo
from services.zoo.source import open_zoo
from tests.crossmodal.conftest import tiny_spec
from tests.hub_server import Hub, reach, serve
from tests.recorder import Recorder
from tests.zoo.test_source import same


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        execute(command.app, "crossmodal", [str(argument) for argument in arguments])
    code = left.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(scope="module")
def exported(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo in the JSON-string form."""
    folder = tmp_path_factory.mktemp("command")
    zoo.save(folder / "zoo")
    export_json(folder / "zoo", folder / "json")
    return folder / "json"


@pytest.fixture
def hub(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """With the zoo as ``them/zoo``."""
    with serve() as hub:
        reach(hub.url, monkeypatch, tmp_path / "cache")
        files = [file for file in exported.rglob("*") if file.is_file()]
        hub.repos["them/zoo"] = {str(file.relative_to(exported)): file.read_bytes() for file in files}
        yield hub


def test_an_interrupted_run_on_a_dataset_of_the_hub_goes_on(
    zoo: Zoo, exported: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(tiny_spec().model_dump_json())
    typed = ("train", "them/zoo", "-f", spec, "-o", tmp_path / "run", "--device", "cpu")
    monkeypatch.setattr(local, "CHECKPOINT_SECONDS", 0.0)
    # What comes after training takes its time, and is tested elsewhere.
    monkeypatch.setattr(job, "evaluate", lambda *_: {"summary": [], "figures": {}, "subjects": {}})
    monkeypatch.setattr(job, "write_report", lambda folder, *_: folder.mkdir())
    advance, trained = ConsoleRun.advance, list[int]()
    stages: list[str] = []

    def stage(run: ConsoleRun, name: str, total: int, unit: str = "steps") -> None:
        stages.append(name)

    def interrupted(run: ConsoleRun, done: int) -> None:
        if stages[-1] == "train" and done == 4:
            raise KeyboardInterrupt
        advance(run, done)

    def watched(run: ConsoleRun, done: int) -> None:
        if stages[-1] == "train":
            trained.append(done)
        advance(run, done)

    monkeypatch.setattr(ConsoleRun, "stage", stage)
    monkeypatch.setattr(ConsoleRun, "advance", interrupted)
    assert call(*typed) == 130
    monkeypatch.setattr(ConsoleRun, "advance", watched)
    assert call(*typed) == 0
    assert trained == [3, 4, 5, 6]
    codec, whole = Codec.load(tmp_path / "run" / "codec"), train(tiny_spec(), open_zoo(exported))
    networks = {name: tensor[:4] for name, tensor in zoo.params.items()}
    assert torch.equal(codec.encode(networks), whole.encode(networks))


def test_what_is_no_zoo_leaves_no_run(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", tmp_path / "nowhere", "-o", tmp_path / "run") == 2
    assert f"ZOO: {tmp_path / 'nowhere'} is no file or folder here" in capsys.readouterr().err
    assert call("train", "them/none", "-o", tmp_path / "run") == 2
    assert "ZOO: no permission to read them/none" in capsys.readouterr().err
    reach("http://127.0.0.1:9", monkeypatch, tmp_path)
    assert call("train", "them/zoo", "-o", tmp_path / "run") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(out: Path, why: str) -> None:
        kept = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        with pytest.raises(InvalidInput, match=why) as caught:
            RunFolder(out).begin(tiny_spec(seed=1))
        assert caught.value.violations[0].field == "--output"
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == kept

    out = tmp_path / "run"
    RunFolder(out).begin(tiny_spec(seed=1))
    RunFolder(out).begin(tiny_spec(seed=1))
    (out / "spec.json").write_text(tiny_spec(seed=2).model_dump_json(indent=2))
    refused(out, "holds a run of another spec")
    RunFolder(tmp_path / "other").begin(tiny_spec(seed=1))
    (tmp_path / "other" / "result.json").write_text("{}")
    refused(tmp_path / "other", "holds a finished run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    refused(tmp_path / "mine", "is not a run")


def test_a_device_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device, why in (("gpu", "gpu is none of cpu"), ("cuda:99", "cuda:99 cannot be used on this machine")):
        assert call("train", tmp_path, "-o", tmp_path / "run", "--device", device) == 2
        assert f"--device: {why}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_artifact_in_the_json_string_form(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        """What came to training."""

    def trained(spec: CrossmodalSpec, zoo: Zoo, *_: object) -> Codec:
        raise Seen(zoo)

    monkeypatch.setattr(job, "train", trained)
    with pytest.raises(Seen) as caught:
        job.run(tiny_spec(), recorder := Recorder(tmp_path, inputs={"zoo": exported}))
    same(caught.value.args[0], open_zoo(exported))
    assert recorder.stage_names == ["read", "judge"]


def test_records_of_one_behaviour_are_refused(exported: Path, tmp_path: Path) -> None:
    rows = parquet.read_table(exported / "data").to_pylist()
    metadata = json.dumps({"selected_patterns": ["has_majority"]})
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps(row | {"metadata": metadata}) for row in rows[:8]))
    with pytest.raises(InvalidInput, match="at least two behaviours") as caught:
        job.run(tiny_spec(), Recorder(tmp_path, inputs={"zoo": file}))
    assert caught.value.violations[0].field == "zoo.patterns"

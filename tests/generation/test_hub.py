"""Upload of a zoo, file by file, to a server that speaks as the Hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.generation import GenerationSpec
from services.generation import buckets, job, pipeline
from services.generation import hub as hub_module
from services.generation.buckets import BucketTrainer
from services.generation.pipeline import DatasetGenerationPipeline
from services.runtime.run import Stopped
from tests.generation.conftest import staged_spec
from tests.hub_server import TOKEN, Hub, reach, serve
from tests.recorder import Recorder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as found:
        reach(found.url, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr(pipeline, "SHARD", 16)
        monkeypatch.setattr(buckets, "CACHE_BYTES", 1)
        monkeypatch.setattr(buckets, "MOST_SHAPES", 1)
        monkeypatch.setattr(hub_module, "PAUSES", (0.01, 0.02))
        yield found


def spec(**changes: Any) -> GenerationSpec:
    return GenerationSpec.model_validate(staged_spec(hub={"repo": "me/zoo"}, **changes).model_dump())


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_files_go_up_as_they_are_made(hub: Hub, tmp_path: Path) -> None:
    made = DatasetGenerationPipeline(spec())
    made.run(tmp_path / "zoo")
    data = [name for _, names in hub.commits for name in names if name.endswith(".parquet")]
    assert data == sorted(name for name in files(tmp_path / "zoo") if name.endswith(".parquet")) and len(data) > 1
    assert made.publish(tmp_path / "zoo") == {"hub": {"repo": "me/zoo", "files": len(data)}}
    assert hub.repos["me/zoo"] == files(tmp_path / "zoo") and hub.private["me/zoo"]
    assert "README.md" in hub.repos["me/zoo"]
    # Each file was sent once, by a commit of its own.
    assert hub.puts == len(data)


def test_the_hub_is_away_for_a_while(hub: Hub, tmp_path: Path) -> None:
    hub.failing = 0
    made = DatasetGenerationPipeline(spec())
    recorder = Recorder()
    warnings: list[str] = []
    recorder.log = lambda message, level="info": warnings.append(message) if level == "warning" else None  # type: ignore[method-assign]
    original = hub_module.HubUpload.add

    def fails_once(self: hub_module.HubUpload, folder: Path, name: str) -> None:
        hub.failing = int(name.endswith("00000.parquet"))
        original(self, folder, name)

    hub_module.HubUpload.add = fails_once  # type: ignore[method-assign]
    try:
        made.run(tmp_path / "zoo", recorder)
    finally:
        hub_module.HubUpload.add = original  # type: ignore[method-assign]
    assert len(warnings) == 1 and "cannot be reached (HTTP 503)" in warnings[0]
    made.publish(tmp_path / "zoo")
    assert hub.repos["me/zoo"] == files(tmp_path / "zoo")


def test_a_hub_that_stays_away_costs_no_record(hub: Hub, tmp_path: Path) -> None:
    kept: list[dict[str, bytes]] = []

    class Keeper(Recorder):
        def stage(self, name: str, total: int, unit: str = "steps") -> None:
            hub.failing = 10**9

        def artifact(self, name: str, type: str, folder: Path) -> None:
            super().artifact(name, type, folder)
            kept.append(files(folder))

    recorder = Keeper()
    result = job.run(spec(), recorder)
    assert "hub" not in result and result["subjects"] == spec().subjects
    assert recorder.levels[-1] == "warning" and "HTTP 503" in recorder.logs[-1]
    assert "`python -m services.generation upload ZOO me/zoo` tries again" in recorder.logs[-1]
    assert recorder.artifacts == [("zoo", "zoo"), ("report", "report")]
    # What the job kept can be sent later.
    hub.failing = 0
    for name, data in kept[0].items():
        (tmp_path / "kept" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kept" / name).write_bytes(data)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "services.generation", "upload", str(tmp_path / "kept"), "me/zoo"]
    subprocess.run(command, env=environment, check=True)
    assert hub.repos["me/zoo"] == kept[0]


def test_an_upload_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    first = Recorder(tmp_path / "checkpoints", every=True, stop_after=2)
    with pytest.raises(Stopped):
        DatasetGenerationPipeline(spec()).run(tmp_path / "cut", first)
    assert hub.puts > 0
    again = DatasetGenerationPipeline(spec())
    again.run(tmp_path / "zoo", Recorder(resume=first.checkpoints[-1]))
    again.publish(tmp_path / "zoo")
    assert hub.repos["me/zoo"] == files(tmp_path / "zoo")
    assert hub.puts == sum(name.endswith(".parquet") for name in hub.repos["me/zoo"])


@pytest.mark.parametrize(("token", "repo"), [("hf_of_nobody", "me/zoo"), (TOKEN, "them/zoo")])
def test_without_permission_nothing_is_trained(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, repo: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(BucketTrainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(InvalidInput, match=f"no permission to write to {repo}") as caught:
        DatasetGenerationPipeline(staged_spec(hub={"repo": repo})).run(tmp_path / "zoo")
    assert caught.value.violations[0].field == "spec.hub.repo"


def test_without_a_network_nothing_is_trained(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach("http://127.0.0.1:9", monkeypatch, tmp_path)
    monkeypatch.setattr(BucketTrainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        DatasetGenerationPipeline(spec()).run(tmp_path / "zoo")
    assert caught.value.violations[0].field == "spec.hub.repo"


def test_another_zoo_is_not_mixed_in(hub: Hub, tmp_path: Path) -> None:
    DatasetGenerationPipeline(spec(subjects=2)).run(tmp_path / "one")
    before = dict(hub.repos["me/zoo"])
    assert json.loads(before["zoo.json"])["spec"]["subjects"] == 2
    with pytest.raises(InvalidInput, match="holds a zoo of another spec"):
        DatasetGenerationPipeline(spec(subjects=3)).run(tmp_path / "two")
    assert hub.repos["me/zoo"] == before


def test_names_that_are_no_repository_are_told() -> None:
    with pytest.raises(ValueError, match=r"hub\.repo"):
        GenerationSpec.model_validate({"hub": {"repo": "no-owner"}})


def test_large_files_that_are_refused_cost_no_record(hub: Hub, tmp_path: Path) -> None:
    hub.refusing = True
    made = DatasetGenerationPipeline(spec())
    made.run(tmp_path / "zoo")
    with pytest.raises(Unavailable):
        made.publish(tmp_path / "zoo")
    hub.refusing = False
    made.publish(tmp_path / "zoo")
    assert hub.repos["me/zoo"] == files(tmp_path / "zoo")


@pytest.mark.parametrize("repo", ["me/-x", "me/a..b", "ow--ner/name", "me/x.git", "a/b/c"])
def test_names_that_the_hub_does_not_allow(repo: str) -> None:
    with pytest.raises(ValueError, match=r"hub\.repo"):
        GenerationSpec.model_validate({"hub": {"repo": repo}})


# The last is of the same spec, but its subjects were trained on another split.
@pytest.mark.parametrize(
    "there", ["[]", "no JSON", "{}", json.dumps({"format": 2, "spec": spec().model_dump(mode="json")})]
)
def test_a_repository_with_something_else(hub: Hub, tmp_path: Path, there: str) -> None:
    hub.repos["me/zoo"] = {"zoo.json": there.encode()}
    with pytest.raises(InvalidInput, match="holds a zoo of another spec"):
        DatasetGenerationPipeline(spec()).run(tmp_path / "zoo")

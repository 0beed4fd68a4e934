"""Published models: versions that never change, whoever publishes at the same time."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ethogram.errors import Conflict, InvalidInput, NotFound
from services.artifacts import store as store_module
from services.artifacts.manifest import ModelPointer
from services.artifacts.store import ArtifactStore


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """An empty store of each sort."""
    return ArtifactStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{secrets.token_hex(6)}")


def codec(store: ArtifactStore, folder: Path, type: str = "codec", tenant: str = "default") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    return store.put(folder, name="codec", type=type, tenant=tenant)[0]


def test_versions_and_latest(store: ArtifactStore, tmp_path: Path) -> None:
    first, second = codec(store, tmp_path / "a"), codec(store, tmp_path / "a")
    assert store.publish("default", "m", first).version == "1"
    assert store.publish("default", "m", second).version == "2"
    assert store.publish("default", "m", first, "rc.1").version == "rc.1"
    assert store.model("default", "m").version == "rc.1"
    assert store.publish("default", "m", second, "40").artifact == second
    assert store.publish("default", "m", first).version == "41"
    assert [model.version for model in store.models("default")] == ["1", "2", "rc.1", "40", "41"]
    assert store.model("default", "m", "2").artifact == second
    with pytest.raises(Conflict, match="has a version 2 already"):
        store.publish("default", "m", first, "2")
    assert store.model("default", "m", "2").artifact == second


def test_a_version_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    id = codec(store, tmp_path / "a")
    store.publish("default", "m", id)
    # What a crash can leave on a file system without links.
    (tmp_path / "store/models/default/m/2.json").touch()
    assert store.publish("default", "m", id).version == "3"
    assert [model.version for model in store.models("default")] == ["1", "3"]


def test_retire(store: ArtifactStore, tmp_path: Path) -> None:
    id = codec(store, tmp_path / "a")
    for _ in range(2):
        store.publish("default", "m", id)
    assert store.retire("default", "m", "2").retired
    assert store.model("default", "m").version == "1"
    assert store.model("default", "m", "2").retired
    # Its number is not given again.
    assert store.publish("default", "m", id).version == "3"
    for version in ("1", "3"):
        store.retire("default", "m", version)
    with pytest.raises(NotFound, match="no model m"):
        store.model("default", "m")
    assert [model.retired for model in store.models("default")] == [True] * 3


def test_what_cannot_be_published(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be served") as caught:
        store.publish("default", "m", codec(store, tmp_path / "a", type="zoo"))
    assert caught.value.violations[0].field == "artifact"
    with pytest.raises(NotFound):
        store.publish("default", "m", codec(store, tmp_path / "a", tenant="other"))
    assert store.models("default") == []


def test_what_is_not_there(store: ArtifactStore) -> None:
    with pytest.raises(NotFound):
        store.model("default", "m")
    for call in (store.model, store.retire):
        with pytest.raises(NotFound):
            call("default", "m", "1")
    assert store.models("default") == []


def test_a_clock_set_back_does_not_hide_the_new_one(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = codec(store, tmp_path / "a")
    store.publish("default", "m", id)
    monkeypatch.setattr(store_module, "_now", lambda: datetime.now(UTC) - timedelta(days=1))
    store.publish("default", "m", id)
    assert store.model("default", "m").version == "2"


def test_many_publish_at_the_same_time(store: ArtifactStore, tmp_path: Path) -> None:
    id = codec(store, tmp_path / "a")
    published: list[ModelPointer] = []
    conflicts: list[Conflict] = []
    barrier = threading.Barrier(8)

    def publish() -> None:
        barrier.wait()
        for _ in range(3):
            published.append(store.publish("default", "m", id))
        try:
            published.append(store.publish("default", "m", id, "stable"))
        except Conflict as error:
            conflicts.append(error)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbered = sorted(int(model.version) for model in published if model.version != "stable")
    assert numbered == list(range(1, 25))
    assert len(conflicts) == 7


def test_processes_publish_at_the_same_time(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    id = codec(ArtifactStore(url), tmp_path / "a")
    code = (
        "import sys; from services.artifacts.store import ArtifactStore; store = ArtifactStore(sys.argv[1]); "
        "sys.stdin.readline(); print(*(store.publish('default', 'm', sys.argv[2]).version for _ in range(10)))"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code, url, id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [other.communicate("\n", timeout=60)[0] for other in others]
    assert sorted(int(version) for output in outputs for version in output.split()) == list(range(1, 31))


def test_retiring_again_does_not_undo_a_deletion(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = codec(store, tmp_path / "a")
    store.publish("default", "m", id, "1")
    store.retire("default", "m", "1")
    model = store.model

    def slow(*words: str) -> ModelPointer:
        """Reads before the deletion; what is done with it comes after."""
        found = model(*words)
        store.withdraw(id)
        return found

    monkeypatch.setattr(store, "model", slow)
    store.retire("default", "m", "1")
    assert store.published() == set()

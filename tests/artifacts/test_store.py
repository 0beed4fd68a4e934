"""The artifact store: in a folder, and on another file system through fsspec."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ethogram.errors import Conflict, IllegalState, InvalidInput, NotFound, Unavailable
from services.artifacts import backends
from services.artifacts.manifest import digest
from services.artifacts.store import ArtifactStore


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """An empty store of each sort."""
    return ArtifactStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{secrets.token_hex(6)}")


@pytest.fixture
def local(tmp_path: Path) -> ArtifactStore:
    """An empty store in a folder."""
    return ArtifactStore(str(tmp_path / "store"))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a few files."""
    return write(tmp_path / "source", {"config.json": b"{}", "weights/encoder.bin": b"\0\xff" * 1000, "empty": b""})


def blobs(store: ArtifactStore) -> list[Path]:
    return sorted(path for path in (Path(store.url) / "blobs").rglob("*") if path.is_file())


def test_round_trip(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    parents = ["a" * 64]
    id, manifest = store.put(
        source,
        name="codec",
        type="codec",
        job="job_1",
        attempt="att_1",
        spec={"seed": 3, "zoo": {"artifact": "é"}},
        parents=parents,
        meta={"accuracy": 0.5},
    )
    assert id == digest(manifest.canonical())
    assert store.manifest(id) == manifest
    assert (manifest.tenant, manifest.job, manifest.attempt, manifest.parents) == ("default", "job_1", "att_1", parents)
    assert manifest.spec == {"seed": 3, "zoo": {"artifact": "é"}}
    assert manifest.size == 2002
    assert manifest.files["config.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    assert list(manifest.files) == ["config.json", "empty", "weights/encoder.bin"]
    with store.open(id, "weights/encoder.bin") as file:
        assert file.read(3) == b"\0\xff\0"
    assert store.fetch(id, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert read(tmp_path / "a" / "b") == read(source)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_the_manifest_is_the_last_word_on_its_bytes(local: ArtifactStore, source: Path) -> None:
    id, manifest = local.put(source, name="zoo", type="zoo")
    text = (Path(local.url) / "manifests" / id[:2] / f"{id}.json").read_bytes()
    assert text == manifest.canonical()
    assert b" " not in text
    assert text.index(b'"attempt"') < text.index(b'"code_version"') < text.index(b'"type"')


def test_equal_files_are_kept_once(local: ArtifactStore, source: Path) -> None:
    local.put(source, name="zoo", type="zoo")
    before = blobs(local)
    (source / "copy").write_bytes(b"{}")
    local.put(source, name="zoo", type="zoo")
    assert blobs(local) == before
    assert list((Path(local.url) / "tmp").iterdir()) == []


def test_what_is_written_later_does_not_reach_the_store(local: ArtifactStore, source: Path) -> None:
    id, _ = local.put(source, name="zoo", type="zoo")
    with (source / "config.json").open("r+b") as file:
        file.write(b"[]")
    assert local.open(id, "config.json").read() == b"{}"


def test_fetch_links_and_refuses_to_overwrite(local: ArtifactStore, source: Path, tmp_path: Path) -> None:
    id, manifest = local.put(source, name="zoo", type="zoo")
    (tmp_path / "there").mkdir()
    fetched = local.fetch(id, tmp_path / "there")
    blob = Path(local.url) / backends.blob_path(manifest.files["config.json"].sha256)
    assert (fetched / "config.json").stat().st_ino == blob.stat().st_ino
    assert (fetched / "config.json").stat().st_mode & 0o222 == 0
    with pytest.raises(Conflict, match="not an empty folder"):
        local.fetch(id, fetched)


def test_fetch_copies_where_links_are_not_possible(
    local: ArtifactStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, _ = local.put(source, name="codec", type="codec")

    def other_device(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    assert read(local.fetch(id, tmp_path / "copy")) == read(source)
    assert local.publish("default", "m", id).version == "1"
    with pytest.raises(Conflict):
        local.publish("default", "m", id, "1")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\\b", "a\0b", "", ".", "a//b", "a/", "\ud800"])
def test_paths_that_leave_the_artifact(store: ArtifactStore, source: Path, path: str) -> None:
    id, _ = store.put(source, name="zoo", type="zoo")
    with pytest.raises(InvalidInput) as caught:
        store.open(id, path)
    assert caught.value.violations[0].field == "path"


def test_what_is_not_there(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    id, _ = store.put(source, name="zoo", type="zoo")
    with pytest.raises(NotFound, match="no file 'nothing'"):
        store.open(id, "nothing")
    for wrong in ("0" * 64, "zoo", "", "../../x", id.upper(), id + "\n"):
        with pytest.raises(NotFound):
            store.manifest(wrong)
        with pytest.raises(NotFound):
            store.fetch(wrong, tmp_path / "x")
        with pytest.raises(NotFound):
            store.publish("default", "m", wrong)
    assert not (tmp_path / "x").exists()


def test_damage_is_seen_and_repaired(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    id, manifest = store.put(source, name="zoo", type="zoo")
    blob = backends.blob_path(manifest.files["config.json"].sha256)
    store.backend.write(blob, b"{")
    with pytest.raises(IllegalState, match=r"damaged: config\.json"):
        store.fetch(id, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    store.put(source, name="zoo", type="zoo")
    assert read(store.fetch(id, tmp_path / "x")) == read(source)
    store.backend.write(f"manifests/{id[:2]}/{id}.json", b"{}")
    with pytest.raises(IllegalState, match="damaged: its manifest"):
        store.manifest(id)


def test_a_blob_that_is_gone(local: ArtifactStore, source: Path, tmp_path: Path) -> None:
    id, manifest = local.put(source, name="zoo", type="zoo")
    (Path(local.url) / backends.blob_path(manifest.files["config.json"].sha256)).unlink()
    with pytest.raises(IllegalState, match="damaged"):
        local.open(id, "config.json")
    with pytest.raises(IllegalState, match="damaged"):
        local.fetch(id, tmp_path / "x")


def test_folders_that_cannot_be_kept(local: ArtifactStore, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(InvalidInput, match="is not a folder"):
        local.put(folder, name="zoo", type="zoo")
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="must hold 1 to"):
        local.put(folder, name="zoo", type="zoo")
    (folder / "secret").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match="link or a device"):
        local.put(folder, name="zoo", type="zoo")
    (folder / "secret").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(InvalidInput, match="link or a device"):
        local.put(folder, name="zoo", type="zoo")
    (folder / "pipe").unlink()
    (folder / "back\\slash").write_bytes(b"")
    with pytest.raises(InvalidInput, match="backslash"):
        local.put(folder, name="zoo", type="zoo")
    (folder / "back\\slash").unlink()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_bytes(b"")
    with pytest.raises(InvalidInput, match="UTF-8"):
        local.put(folder, name="zoo", type="zoo")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "x" * 81, "a\0", "ä"])
def test_names_that_cannot_be(local: ArtifactStore, source: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        local.put(source, name=name, type="zoo")
    with pytest.raises(InvalidInput, match="tenant"):
        local.put(source, name="zoo", type="zoo", tenant=name)
    id, _ = local.put(source, name="codec", type="codec")
    for call in (
        lambda: local.publish("default", name, id),
        lambda: local.publish(name, "m", id),
        lambda: local.publish("default", "m", id, name),
        lambda: local.model("default", name),
        lambda: local.models(name),
    ):
        with pytest.raises(InvalidInput):
            call()


def test_meta_that_is_no_json(local: ArtifactStore, source: Path) -> None:
    for meta in ({"a": float("nan")}, {"a": "\ud800"}, {"a": object()}):
        with pytest.raises(InvalidInput):
            local.put(source, name="zoo", type="zoo", meta=meta)


def test_no_space_left(local: ArtifactStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Unavailable, match=r"the artifact store at .* has no space left; free some$"):
            local.put(source, name="zoo", type="zoo")
    assert list((Path(local.url) / "tmp").iterdir()) == []
    id, _ = local.put(source, name="zoo", type="zoo")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(Unavailable, match=rf"{tmp_path / 'x'} has no space left"):
            local.fetch(id, tmp_path / "x")
    assert not list(tmp_path.glob(".x*"))


def test_a_store_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be used"):
        ArtifactStore(str(tmp_path / "file" / "store"))
    with pytest.raises(InvalidInput, match="store"):
        ArtifactStore("nonsense://bucket")


def test_a_store_that_went_away(local: ArtifactStore, source: Path) -> None:
    local.check_writable()
    shutil.rmtree(local.url)
    with pytest.raises(Unavailable, match="is gone"):
        local.check_writable()
    with pytest.raises(Unavailable, match="is gone"):
        local.put(source, name="zoo", type="zoo")


def test_the_store_loads_neither_torch_nor_fsspec() -> None:
    code = "import sys, services.artifacts.store as s; print({'torch', 'fsspec', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 100
)
TREES = st.dictionaries(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=200), min_size=1)


def consistent(files: dict[str, bytes]) -> bool:
    return not any(other.startswith(f"{path}/") for path in files for other in files)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that hypothesis may fill again and again."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=TREES.filter(consistent))
def test_any_tree_comes_back(scratch: Path, files: dict[str, bytes]) -> None:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    write(folder / "source", files)
    store = ArtifactStore(str(scratch / "store"))
    id, manifest = store.put(folder / "source", name="tree", type="tree")
    assert set(manifest.files) == set(files)
    assert read(store.fetch(id, folder / "copy")) == files


def test_the_same_files_from_many_threads(local: ArtifactStore, source: Path, tmp_path: Path) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(local.put(source, name="zoo", type="zoo")[0])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    for number, id in enumerate(ids):
        assert read(local.fetch(id, tmp_path / str(number))) == read(source)

"""Collection: what somebody needs stays whole, all else goes."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

from ethogram.errors import IllegalState, NotFound, Unavailable
from services.artifacts import remote
from services.artifacts.backends import blob_path
from services.artifacts.collect import Collected, Collector, Needs
from services.artifacts.store import ArtifactStore, manifest_path


class Registry:
    """Stands in for the registry: what it names, and who runs."""

    def __init__(self) -> None:
        self.live, self.attempts, self.spent = set[str](), set[str](), set[str]()
        self.now = 0.0

    def needs(self) -> Needs:
        return Needs(live=set(self.live), attempts=set(self.attempts), spent=set(self.spent))

    def forget(self, ids: AbstractSet[str]) -> AbstractSet[str]:
        return ids - self.live

    def collector(self, store: ArtifactStore, grace: float = 0.0) -> Collector:
        return Collector(store, self.needs, self.forget, grace_seconds=grace, clock=lambda: self.now)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """An empty store of each sort."""
    return ArtifactStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{secrets.token_hex(6)}")


@pytest.fixture
def local(tmp_path: Path) -> ArtifactStore:
    """An empty store in a folder."""
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def registry() -> Registry:
    """A registry that names nothing."""
    return Registry()


def put(store: ArtifactStore, folder: Path, *texts: str, attempt: str | None = None, type: str = "codec") -> str:
    source = folder / secrets.token_hex(4)
    source.mkdir()
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_text(text)
    id = store.put(source, name="thing", type=type, attempt=attempt)[0]
    shutil.rmtree(source)
    return id


def whole(store: ArtifactStore, folder: Path, id: str) -> bool:
    """Whether the artifact is there. Raises unless it is there with every byte, or not at all."""
    target = folder / secrets.token_hex(4)
    try:
        store.fetch(id, target)
    except NotFound:
        return False
    shutil.rmtree(target)
    return True


def files(store: ArtifactStore) -> list[str]:
    """Paths of all blobs."""
    return sorted(
        f"blobs/{part}/{name}" for part in store.backend.names("blobs") for name in store.backend.names(f"blobs/{part}")
    )


def test_what_is_needed_stays_and_the_rest_goes(store: ArtifactStore, registry: Registry, tmp_path: Path) -> None:
    live = put(store, tmp_path, "shared", "own")
    model, retired = put(store, tmp_path, "model"), put(store, tmp_path, "retired")
    for id in (model, retired):
        store.publish("default", "m", id)
    store.retire("default", "m", "2")
    under_way = put(store, tmp_path, "shared", "late", attempt="att_1")
    spent, crashed = (put(store, tmp_path, "shared", text, attempt=f"att_{text}") for text in ("1", "0"))
    upload = put(store, tmp_path, "never recorded")
    registry.live, registry.attempts, registry.spent = {live}, {"att_1"}, {spent}
    done = registry.collector(store).collect()
    assert [whole(store, tmp_path, id) for id in (live, model, retired, under_way)] == [True] * 4
    assert [whole(store, tmp_path, id) for id in (spent, crashed, upload)] == [False] * 3
    assert (done.artifacts, done.files) == (3, 3)
    assert done.bytes > len("never recorded")
    assert len(files(store)) == 5
    registry.attempts = set()
    registry.collector(store).collect()
    assert not whole(store, tmp_path, under_way)
    assert registry.collector(store).collect() == Collected()


def test_garbage_must_be_seen_as_such_for_the_time(store: ArtifactStore, registry: Registry, tmp_path: Path) -> None:
    collector = registry.collector(store, grace=100.0)
    id, other = put(store, tmp_path, "a"), put(store, tmp_path, "b")

    def there_at(now: float) -> tuple[bool, bool]:
        registry.now = now
        collector.collect()
        return whole(store, tmp_path, id), whole(store, tmp_path, other)

    assert there_at(0) == there_at(99) == (True, True)
    registry.live = {id}
    assert there_at(99.5) == (True, True)
    registry.live = set()
    assert there_at(101) == (True, False)
    # Its file was needed until then.
    assert there_at(199.6) == (True, False)
    assert len(files(store)) == 2
    # A collector that starts anew begins to watch anew.
    collector = registry.collector(store, grace=100.0)
    assert there_at(300) == there_at(399) == (True, False)
    assert there_at(400) == (False, False)
    assert there_at(499) == there_at(501) == (False, False)
    assert files(store) == []


def test_times_of_files_mean_nothing(local: ArtifactStore, registry: Registry, tmp_path: Path) -> None:
    collector = registry.collector(local, grace=100.0)
    put(local, tmp_path, "a")
    (tmp_path / "store/tmp/left").write_text("by a writer that was killed")
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (0, 0))
    collector.collect()
    registry.now = 99.0
    assert collector.collect() == Collected()
    registry.now = 100.0
    done = collector.collect()
    assert (done.artifacts, done.files) == (1, 1)
    assert not (tmp_path / "store/tmp/left").exists()


@pytest.mark.parametrize("what", ["a manifest", "a pointer", "a folder"])
def test_nothing_is_deleted_by_one_who_cannot_see_all(
    local: ArtifactStore, registry: Registry, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    id, garbage = put(local, tmp_path, "a"), put(local, tmp_path, "b")
    local.publish("default", "m", id)
    names = local.backend.names

    def refused(path: str) -> list[str]:
        if path.startswith("manifests/"):
            raise PermissionError(13, "Permission denied")
        return names(path)

    if what == "a manifest":
        local.backend.write(manifest_path(id), b"{")
    elif what == "a pointer":
        local.backend.write("models/default/m/1.json", b"")
    else:
        monkeypatch.setattr(local.backend, "names", refused)
    with pytest.raises(Unavailable if what == "a folder" else IllegalState, match="cannot be"):
        registry.collector(local).collect()
    assert whole(local, tmp_path, garbage)
    assert len(files(local)) == 2


def test_a_registry_that_does_not_answer(store: ArtifactStore, registry: Registry, tmp_path: Path) -> None:
    id = put(store, tmp_path, "a")

    def away(ids: AbstractSet[str]) -> AbstractSet[str]:
        raise Unavailable("the database is away")

    with pytest.raises(Unavailable):
        Collector(store, registry.needs, away, grace_seconds=0.0).collect()
    assert whole(store, tmp_path, id)
    assert store.backend.names(remote.MARKS) == []


def test_an_artifact_that_is_named_at_the_last_moment(store: ArtifactStore, registry: Registry, tmp_path: Path) -> None:
    id = put(store, tmp_path, "a")
    published = put(store, tmp_path, "b")

    def needs() -> Needs:
        seen = registry.needs()
        registry.live.add(id)
        store.publish("default", "m", published)
        return seen

    Collector(store, needs, registry.forget, grace_seconds=0.0).collect()
    assert whole(store, tmp_path, id) and whole(store, tmp_path, published)


def test_an_upload_is_safe_from_its_first_file_to_its_row(
    store: ArtifactStore, registry: Registry, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("a")
    stop = threading.Event()

    def collect() -> None:
        collector = registry.collector(store)
        while not stop.is_set():
            collector.collect()

    thread = threading.Thread(target=collect)
    thread.start()

    def record(id: str, _: object) -> None:
        time.sleep(0.05)
        registry.live.add(id)

    try:
        ids = [store.put(source, name="up", type="file", record=record)[0] for _ in range(10)]
    finally:
        stop.set()
        thread.join()
    assert all(whole(store, tmp_path, id) for id in ids)


def test_a_writer_waits_for_the_mark_of_a_collector(tmp_path: Path) -> None:
    store = ArtifactStore(f"memory://{secrets.token_hex(6)}")
    first = put(store, tmp_path, "a")
    blob = files(store)[0]
    made: list[str] = []
    writer = threading.Thread(target=lambda: made.append(put(store, tmp_path, "a")))
    with store.backend.collecting([blob]) as may_delete:
        writer.start()
        writer.join(0.4)
        assert writer.is_alive() and may_delete()
        # It has found the file there, and has named it; the collector decided before.
        store.backend.delete(manifest_path(first))
        store.backend.delete(blob)
    writer.join(10)
    assert whole(store, tmp_path, made[0])
    # The mark of another's files holds nobody up.
    with store.backend.collecting([blob_path("0" * 64)]):
        put(store, tmp_path, "a")


def test_the_mark_of_a_dead_collector(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(f"memory://{secrets.token_hex(6)}")
    put(store, tmp_path, "a")
    left = store.backend.collecting(files(store))
    left.__enter__()
    monkeypatch.setattr(remote, "DEAD_SECONDS", 0.6)
    began = time.monotonic()
    put(store, tmp_path, "a")
    assert 0.6 < time.monotonic() - began < 5
    collector = registry.collector(store, grace=1e9)
    for registry.now in (0.0, 800.0):
        collector.collect()
        assert len(store.backend.names(remote.MARKS)) == 1
    registry.now = 1000.0
    collector.collect()
    assert store.backend.names(remote.MARKS) == []


def test_a_collector_that_was_held_up_deletes_nothing_more(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(f"memory://{secrets.token_hex(6)}")
    id = put(store, tmp_path, "a")
    monkeypatch.setattr(remote, "MARK_SECONDS", 0.0)
    assert registry.collector(store).collect() == Collected()
    assert whole(store, tmp_path, id)


def test_a_writer_at_work_keeps_the_collector_away(
    local: ArtifactStore, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, tmp_path, "a")
    monkeypatch.setattr("services.artifacts.backends.ALONE_SECONDS", 0.1)
    with local.backend.writing(), local.backend.writing():
        assert registry.collector(local).collect() == Collected()
    assert registry.collector(local).collect().artifacts == 1


def test_a_retired_model_can_be_withdrawn(store: ArtifactStore, registry: Registry, tmp_path: Path) -> None:
    id = put(store, tmp_path, "a")
    store.publish("default", "m", id)
    store.withdraw(put(store, tmp_path, "not published"))
    with pytest.raises(IllegalState, match="model m version 1: retire that first"):
        store.withdraw(id)
    store.retire("default", "m", "1")
    store.withdraw(id)
    assert store.models("default") == [] and store.published() == set()
    with pytest.raises(NotFound, match="version 1 was deleted"):
        store.model("default", "m", "1")
    registry.collector(store).collect()
    assert not whole(store, tmp_path, id)
    # The number stays taken.
    assert store.publish("default", "m", put(store, tmp_path, "b")).version == "2"


COLLECT = """
import os, signal, sys
from pathlib import Path
from ethogram.errors import EthogramError
from services.artifacts.collect import Collector, Needs
from services.artifacts.store import ArtifactStore

url, live, kill_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
store = ArtifactStore(url)
delete, deleted = store.backend.delete, 0

def counting(path):
    global deleted
    deleted += 1
    if deleted == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return delete(path)

store.backend.delete = counting

def forget(ids):
    return {id for id in ids if not (live / id).exists()}

def needs():
    return Needs(live=set(os.listdir(live)), attempts=set(), spent=set())

collector = Collector(store, needs, forget, grace_seconds=0.0)
while True:
    try:
        collector.collect()
    except EthogramError as error:
        # Elsewhere than in a folder a file may be seen half written.
        print(error.message)
    if kill_after:
        print(deleted)
        sys.exit()
"""


def test_a_collector_that_is_killed_anywhere(local: ArtifactStore, tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    kept = put(local, tmp_path, "shared", "kept")
    (live / kept).touch()
    garbage = [put(local, tmp_path, "shared", str(number)) for number in range(4)]
    killed = 0
    # Four manifests and four files; each process deletes two of them.
    for _ in range(8):
        ended = subprocess.run([sys.executable, "-c", COLLECT, local.url, str(live), "3"], capture_output=True)
        # Whatever is there is whole.
        assert whole(local, tmp_path, kept)
        left = [whole(local, tmp_path, id) for id in garbage]
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        killed += 1
    assert killed == 3 and not any(left)
    assert len(files(local)) == 2


WRITE = """
import random, sys, tempfile
from pathlib import Path
from services.artifacts.store import ArtifactStore

url, live, seed, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
store, chance = ArtifactStore(url), random.Random(seed)
mine = []
with tempfile.TemporaryDirectory() as folder:
    for number in range(rounds):
        source = Path(folder) / str(number)
        source.mkdir()
        for text in chance.sample("abcdef", 3):
            (source / text).write_text(text * 1000)
        put = store.put(source, name="x", type="x", job=f"{seed}-{number}", record=lambda id, _: (live / id).touch())
        mine.append(put[0])
        if chance.random() < 0.8:
            (live / mine.pop(chance.randrange(len(mine)))).unlink()
print("done")
"""


@pytest.mark.parametrize("sort", ["folder", "fsspec"])
def test_processes_write_equal_files_while_others_collect(tmp_path: Path, sort: str) -> None:
    url = str(tmp_path / "store") if sort == "folder" else f"local://{tmp_path / 'store'}"
    live = tmp_path / "live"
    live.mkdir()
    store = ArtifactStore(url)

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, url, str(live), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    rounds = 200
    collectors = [start(COLLECT, "0") for _ in range(2)]
    writers = [start(WRITE, str(seed), str(rounds)) for seed in range(3)]
    chance = random.Random(1)
    while any(writer.poll() is None for writer in writers):
        time.sleep(0.3)
        if sort == "folder":
            # A dead collector's lock is free at once; its mark, elsewhere, is not.
            victim = chance.randrange(2)
            collectors[victim].kill()
            collectors[victim].communicate()
            collectors[victim] = start(COLLECT, "0")
    for writer in writers:
        said, errors = writer.communicate()
        assert said == "done\n", errors
    for collector in collectors:
        assert collector.poll() is None, collector.communicate()
        collector.kill()
        collector.communicate()
    ids = [path.name for path in live.iterdir()]
    assert ids
    for id in ids:
        assert whole(store, tmp_path, id)

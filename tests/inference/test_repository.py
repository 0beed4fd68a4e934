"""Which model a request gets: found on a miss, loaded once, replaced, evicted."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ethogram.errors import IllegalState, InvalidInput, NotFound, TooLarge
from services.artifacts import store as store_module
from services.artifacts.store import ArtifactStore
from services.inference.batcher import Arrays, Batcher
from services.inference.repository import ModelRepository, Reference, Served
from services.inference.server import LOADERS

LATEST = Reference("default", "m", None)


class Shelf:
    """A store of models that are a line of text, and a repository that counts how often it loads each."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.store = folder, ArtifactStore(str(folder / "store"))
        (folder / "scratch").mkdir()
        self.loads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.gate.set()
        self.repository = ModelRepository(self.store, {"codec": self.load}, scratch=folder / "scratch", **options)

    def load(self, bundle: Path) -> str:
        text = (bundle / "model.txt").read_text().strip()
        self.loads[text] += 1
        assert self.gate.wait(10)
        if text == "broken":
            raise ValueError("the secret cause")
        if text == "huge":
            raise MemoryError
        return text

    def publish(self, text: str, name: str = "m") -> str:
        folder = self.folder / f"source-{text.strip()}"
        folder.mkdir(exist_ok=True)
        (folder / "model.txt").write_text(text)
        artifact, _ = self.store.put(folder, name="codec", type="codec")
        return self.store.publish("default", name, artifact).version

    async def get(self, name: str = "m", version: str | None = None) -> str:
        return (await self.repository.get(Reference("default", name, version), str)).model


async def test_many_callers_one_load(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    shelf.gate.clear()
    references = [LATEST, Reference("default", "m", "1")] * 10
    callers = [asyncio.create_task(shelf.repository.get(reference, str)) for reference in references]
    while not shelf.loads:
        await asyncio.sleep(0.001)
    # It is the first caller's request that began the load.
    callers[0].cancel()
    await asyncio.sleep(0)
    shelf.gate.set()
    answers = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [answer.model for answer in answers[1:] if isinstance(answer, Served)] == ["one"] * 19
    assert shelf.loads == {"one": 1}
    assert not list((tmp_path / "scratch").iterdir())


async def test_a_later_version_takes_over_and_is_loaded_before(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    assert await shelf.get() == "one"
    shelf.publish("two")
    assert await shelf.get() == "one"
    shelf.gate.clear()
    refresh = asyncio.create_task(shelf.repository.refresh())
    while not shelf.loads["two"]:
        await asyncio.sleep(0.001)
    assert await asyncio.wait_for(shelf.get(), 1) == "one"
    shelf.gate.set()
    await refresh
    assert await shelf.get() == "two"
    assert await shelf.get(version="1") == "one"


async def test_a_retired_version_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    shelf.publish("two")
    assert await shelf.get() == "two"
    shelf.store.retire("default", "m", "2")
    await shelf.repository.refresh()
    assert await shelf.get() == "one"
    shelf.store.retire("default", "m", "1")
    await shelf.repository.refresh()
    with pytest.raises(NotFound):
        await shelf.get()


async def test_a_deleted_version_is_served_no_more(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    shelf.store.retire("default", "m", "1")
    assert await shelf.get(version="1") == "one"
    shelf.store.withdraw(shelf.store.model("default", "m", "1").artifact)
    await shelf.repository.refresh()
    with pytest.raises(NotFound, match="was deleted"):
        await shelf.get(version="1")


async def test_a_broken_later_version_leaves_the_old_one(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    assert await shelf.get() == "one"
    shelf.publish("broken")
    for _ in range(3):
        await shelf.repository.refresh()
    assert await shelf.get() == "one"
    with pytest.raises(IllegalState, match="cannot be served") as caught:
        await shelf.get(version="2")
    assert "secret" not in caught.value.message
    assert shelf.loads["broken"] == 1


async def test_a_store_that_is_away_does_not_stop_what_is_loaded(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    assert await shelf.get() == "one"
    shutil.move(tmp_path / "store", tmp_path / "away")
    (tmp_path / "store").write_text("in the way")
    await shelf.repository.refresh()
    assert await shelf.get() == "one"


async def test_the_least_recently_used_leaves(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, max_models=2)
    for name in ("a", "b", "c"):
        shelf.publish(name, name=name)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert await shelf.get(name) == name
    assert shelf.loads == {"a": 1, "b": 2, "c": 1}


async def test_models_share_a_number_of_bytes(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, max_bytes=10)
    for text in ("aaaa", "bbbb", "cccc", "d" * 11):
        shelf.publish(text, name=text[0])
    for name in ("a", "b", "b", "c", "b", "a"):
        await shelf.get(name)
    assert shelf.loads == {"aaaa": 2, "bbbb": 1, "cccc": 1}
    with pytest.raises(TooLarge, match="ETHOGRAM_MAX_MODEL_BYTES"):
        await shelf.get("d")


async def test_without_memory_the_others_leave_and_then_it_says_so(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    shelf.publish("huge", name="huge")
    await shelf.get()
    with pytest.raises(TooLarge, match="cannot hold model huge"):
        await shelf.get("huge")
    assert shelf.loads == {"one": 1, "huge": 2}
    assert await shelf.get() == "one"


async def test_one_artifact_under_two_names_is_in_memory_once(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    artifact = shelf.store.model("default", "m").artifact
    shelf.store.publish("default", "other", artifact)
    assert await shelf.get() == await shelf.get("other") == "one"
    assert shelf.loads == {"one": 1}


async def test_unknown_models(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    for name, version in (("x", None), ("m", "2")):
        with pytest.raises(NotFound):
            await shelf.get(name, version)


class Scaler:
    """A toy model of a second type: it multiplies by the number in its artifact."""

    def __init__(self, folder: Path) -> None:
        self.factor = float((folder / "model.txt").read_text())

    def scale(self, arrays: Arrays) -> Arrays:
        return {"y": arrays["x"] * self.factor}


async def test_a_second_type_of_model_is_served_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PUBLISHABLE", frozenset({"codec", "scaler"}))
    shelf = Shelf(tmp_path)
    shelf.publish("one")
    (tmp_path / "scaler").mkdir()
    (tmp_path / "scaler" / "model.txt").write_text("3")
    artifact, _ = shelf.store.put(tmp_path / "scaler", name="scaler", type="scaler")
    shelf.store.publish("default", "tripler", artifact)
    loaders = {"codec": shelf.load, "scaler": Scaler}
    repository, batcher = ModelRepository(shelf.store, loaders, scratch=tmp_path / "scratch"), Batcher()
    tripler = Reference("default", "tripler", None)
    assert (await repository.get(LATEST, str)).model == "one"
    served = await repository.get(tripler, Scaler)
    batcher.start()
    try:
        key, rows = (served.pointer.artifact, "scale"), [np.array([[float(i)]]) for i in range(3)]
        answers = await asyncio.gather(*(batcher.run(key, served.model.scale, {"x": row}) for row in rows))
    finally:
        await batcher.stop()
    assert [answer["y"].item() for answer in answers] == [0, 3, 6]
    with pytest.raises(InvalidInput, match=r"model\.name: tripler is a scaler, which this call does not take"):
        await repository.get(tripler, str)
    with pytest.raises(IllegalState, match="its artifact is a scaler; this server serves codec"):
        await shelf.repository.get(tripler, str)


def test_what_can_be_published_can_be_served() -> None:
    assert set(LOADERS) == store_module.PUBLISHABLE

"""A zoo made by several jobs is the zoo that one makes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from ethogram.errors import IllegalState, InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.generation import GenerationSpec
from services.generation import buckets, pipeline, progress
from services.generation.pipeline import DatasetGenerationPipeline
from services.runtime.run import ChildJob, Run
from services.zoo.dataset import read_about, read_records
from tests.generation.conftest import small_spec, staged_spec


class Parent(Run):
    """Does what its children would, when it is asked for them."""

    def __init__(self, folder: Path, state: str = "SUCCEEDED") -> None:
        self._folder, self._state = folder, state
        self.rounds: list[list[str]] = []

    def children(self, parts: Mapping[str, tuple[str, Spec]]) -> Mapping[str, ChildJob]:
        self.rounds.append(list(parts))
        for name, (kind, spec) in parts.items():
            assert kind == "generation" and isinstance(spec, GenerationSpec)
            if not (self._folder / name).exists():
                DatasetGenerationPipeline(spec).run(self._folder / name)
        return {name: ChildJob(name, f"job_{name}", self._state, {}, {}, "out of memory") for name in parts}

    def output(self, child: ChildJob, name: str) -> Path:
        assert name == "zoo"
        return self._folder / child.name


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data files, so that a small zoo has several."""
    monkeypatch.setattr(pipeline, "SHARD", 16)
    monkeypatch.setattr(buckets, "CACHE_BYTES", 1)
    monkeypatch.setattr(buckets, "MOST_SHAPES", 1)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("shards", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_shards_make_the_same_zoo(tmp_path: Path, shards: int) -> None:
    spec = staged_spec({"min_degradation_threshold": 0.15}, subjects=40)
    figures = DatasetGenerationPipeline(spec).run(tmp_path / "one")
    parent = Parent(tmp_path)
    found = DatasetGenerationPipeline(spec.model_copy(update={"shards": shards})).run(tmp_path / "many", parent)
    assert found == figures
    names = sorted(file.name for file in (tmp_path / "one" / "data").iterdir())
    assert len(names) > 2 and sorted(file.name for file in (tmp_path / "many" / "data").iterdir()) == names
    one, many = (list(read_records(tmp_path / name)) for name in ("one", "many"))
    assert all(a.equals(b) for a, b in zip(one, many, strict=True))
    about, other = (read_about(tmp_path / name)[0] for name in ("one", "many"))
    assert about["rejected"] == other["rejected"] and about["rejected"]
    # Not all that was tried was accepted, so one round did not do.
    assert len(parent.rounds) > 1 and len(parent.rounds[0]) <= shards
    assert len({name for names in parent.rounds for name in names}) == sum(map(len, parent.rounds))


@pytest.mark.usefixtures("few")
def test_a_part_is_all_that_is_accepted_of_its_candidates(tmp_path: Path) -> None:
    spec = staged_spec(subjects=10)
    whole = spec.model_copy(update={"subjects": 60})
    DatasetGenerationPipeline(whole).run(tmp_path / "whole")
    part = GenerationSpec.model_validate(spec.model_dump() | {"part": {"first": 1, "count": 2}})
    DatasetGenerationPipeline(part).run(tmp_path / "part")
    every = pyarrow.concat_tables(read_records(tmp_path / "whole"))
    expected = every.filter((pyarrow.compute.field("index") >= 16) & (pyarrow.compute.field("index") < 48))
    assert pyarrow.concat_tables(read_records(tmp_path / "part")).equals(expected)


@pytest.mark.usefixtures("few")
def test_a_part_that_failed_is_told(tmp_path: Path) -> None:
    spec = staged_spec(subjects=20, shards=2)
    with pytest.raises(IllegalState, match=r"files-00000 .*FAILED: out of memory"):
        DatasetGenerationPipeline(spec).run(tmp_path / "zoo", Parent(tmp_path, "FAILED"))


@pytest.mark.usefixtures("few")
def test_a_part_of_an_earlier_version_is_not_taken(tmp_path: Path) -> None:
    class Upgraded(Parent):
        def output(self, child: ChildJob, name: str) -> Path:
            file = super().output(child, name) / "zoo.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
            return file.parent

    spec = small_spec(subjects=4, min_accuracy=0.0, training={"steps": 1}, shards=2)
    with pytest.raises(InvalidInput, match="made by another version, which split sequences differently") as caught:
        DatasetGenerationPipeline(spec).run(tmp_path / "zoo", Upgraded(tmp_path))
    assert caught.value.violations[0].field == "shards"


def test_without_a_platform_one_process_does_it(tmp_path: Path) -> None:
    spec = staged_spec(subjects=5)
    DatasetGenerationPipeline(spec).run(tmp_path / "one")
    DatasetGenerationPipeline(spec.model_copy(update={"shards": 7})).run(tmp_path / "many")
    one, many = (pyarrow.concat_tables(read_records(tmp_path / name)) for name in ("one", "many"))
    assert one.equals(many)


@pytest.mark.parametrize("changes", [{"shards": 2}, {"hub": {"repo": "me/zoo"}}])
def test_a_part_is_no_whole(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="part cannot be combined with shards"):
        GenerationSpec.model_validate({"part": {"first": 0, "count": 1}} | changes)


@pytest.mark.usefixtures("few")
def test_parts_that_yield_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 8)
    hopeless = staged_spec({"min_degradation_threshold": 0.99}, subjects=40)
    part = GenerationSpec.model_validate(hopeless.model_dump() | {"part": {"first": 0, "count": 1}})
    assert DatasetGenerationPipeline(part).run(tmp_path / "part")["subjects"] == 0
    # A part may be barren where the next is not, so the whole decides.
    with pytest.raises(InvalidInput, match="pass the checks"):
        DatasetGenerationPipeline(hopeless.model_copy(update={"shards": 2})).run(tmp_path / "zoo", Parent(tmp_path))

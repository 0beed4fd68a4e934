"""Zoos in either form, here and on a Hub: a local server that speaks what the Hugging Face Hub speaks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.generation import GenerationSpec
from services.generation.json_form import export_json, import_json
from services.zoo.dataset import Zoo
from services.zoo.json_records import JsonRecords
from services.zoo.patterns import from_specs
from services.zoo.pools import probes
from services.zoo.source import locate, open_zoo
from services.zoo.subjects import Architecture, flatten, init
from services.zoo.universe import Universe
from tests.hub_server import Hub, reach, serve
from tests.recorder import Recorder

SPEC = GenerationSpec.model_validate(
    {
        "subjects": 24,
        "vocab_size": 5,
        "sequence_length": 4,
        "patterns": [{"name": "palindrome"}, {"name": "starts_with", "token": "B"}, {"name": "sorted_ascending"}],
        "subject": {"init": "independent"},
        "signature": {"probes": 30},
    }
)


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    """Untrained networks of four shapes, each of one behaviour or two."""
    shapes = [
        Architecture(5, 4, "one_hot", (width,) * depth, activation)
        for depth, width, activation in ((1, 6, "relu"), (1, 8, "relu"), (2, 6, "relu"), (2, 6, "tanh"))
    ]
    networks = [(shapes[i % 4], flatten(init(shapes[i % 4], torch.tensor([i]), kaiming=True))[0]) for i in range(24)]
    universe = Universe(5, 4, from_specs(SPEC.patterns, 5, 4))
    return Zoo.of_shapes(
        SPEC,
        torch.arange(24) * 3,
        networks,
        # The first record names the last pattern, so that records alone give another order than the spec.
        labels=torch.tensor([[i % 3 == 2, i % 3 == 1, i % 3 == 0 or i % 4 == 1] for i in range(24)]),
        accuracy=torch.zeros(24, 4),
        probes=probes(universe, 30, seed=7),
    )


@pytest.fixture(scope="module")
def own(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "own"
    zoo.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(own: Path) -> Path:
    export_json(own, own.with_name("exported"))
    return own.with_name("exported")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        reach(hub.url, monkeypatch, tmp_path / "cache")
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same(one: Zoo, other: Zoo) -> None:
    assert one.spec == other.spec and one.patterns == other.patterns and one.layout.shapes == other.layout.shapes
    for name in ("index", "shape", "weights", "labels", "accuracy", "probes"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name


@pytest.mark.parametrize("missing", [[], ["baseline_dataset.json"], ["patterns.json"]])
def test_records_open_as_the_zoo_that_an_import_makes_of_them(
    zoo: Zoo, exported: Path, missing: list[str], tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "json")
    for name in missing:
        (tmp_path / "json" / name).unlink()
    opened = open_zoo(tmp_path / "json")
    import_json(tmp_path / "json", tmp_path / "imported")
    same(opened, Zoo.load(tmp_path / "imported"))
    assert torch.equal(opened.weights, zoo.weights) and torch.equal(opened.index, zoo.index)
    assert torch.equal(opened.probes, zoo.probes) == ("baseline_dataset.json" not in missing)
    # The definitions of the patterns are in the metadata too, so that their order is kept.
    assert torch.equal(opened.labels, zoo.labels)
    assert opened.accuracy.std() > 0.1


def test_our_own_form_opens_as_it_is(zoo: Zoo, own: Path) -> None:
    same(open_zoo(own), Zoo.load(own))
    same(open_zoo(own), zoo)


def test_a_file_of_lines_whose_numbers_repeat(exported: Path, tmp_path: Path) -> None:
    rows = parquet.read_table(exported / "data").to_pylist()
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps(row | {"example_id": 5}) for row in rows))
    opened = open_zoo(file)
    assert opened.index.tolist() == list(range(24))
    assert torch.equal(opened.weights, open_zoo(exported).weights)


def test_a_dataset_of_the_hub_in_either_form(own: Path, exported: Path, hub: Hub) -> None:
    hub.repos |= {"them/own": files(own), "them/json": files(exported) | {"model.bin": b"of no use here"}}
    for name, folder in (("own", own), ("json", exported)):
        found = locate(f"them/{name}", "ZOO")
        assert set(files(found)) == set(files(folder)) - {"README.md"}
        same(open_zoo(found), open_zoo(folder))
    assert locate(str(own), "ZOO") == own


def test_a_zoo_of_an_earlier_version_says_that_it_was_split_otherwise(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "former")
    about = json.loads((own / "zoo.json").read_text())
    assert about["format"] == 3
    (tmp_path / "former" / "zoo.json").write_text(json.dumps(about | {"format": 2}))
    for folder, says in ((own, False), (tmp_path / "former", True)):
        told = Recorder()
        same(open_zoo(folder, told), open_zoo(own))
        assert any("make the zoo again" in line for line in told.logs) == says


@pytest.mark.parametrize(("format", "says"), [("3", "has format '3'; this"), (1, "has format 1; this"), (None, "None")])
def test_a_format_that_there_is_not(format: object, says: str, own: Path, tmp_path: Path) -> None:
    about = json.loads((own / "zoo.json").read_text())
    (tmp_path / "zoo.json").write_text(json.dumps(about | {"format": format}))
    with pytest.raises(InvalidInput, match=f"{says}.* version reads the numbers 2 and 3"):
        open_zoo(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "./some/zoo", "them/set.parquet", "me/x..y", "a/b/c"])
def test_what_is_neither_here_nor_a_name_on_the_hub(source: str) -> None:
    with pytest.raises(InvalidInput, match="is no file or folder here, and no name of a dataset") as caught:
        locate(source, "ZOO")
    assert caught.value.violations[0].field == "ZOO"


def test_a_dataset_that_is_not_there_and_a_hub_that_is_not(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InvalidInput, match="no permission to read them/none, which is no file or folder here"
    ) as caught:
        locate("them/none", "ZOO")
    assert caught.value.violations[0].field == "ZOO"
    reach("http://127.0.0.1:9", monkeypatch, tmp_path)
    with pytest.raises(Unavailable, match=r"cannot be reached .* to read them/none, which is no file or folder here"):
        locate("them/none", "ZOO")


def test_what_holds_no_zoo_is_told(exported: Path, tmp_path: Path) -> None:
    def refused(source: Path, field: str, text: str) -> None:
        with pytest.raises(InvalidInput, match=text) as caught:
            open_zoo(source)
        assert caught.value.violations[0].field == field

    refused(tmp_path, "zoo", r"has neither zoo\.json nor \.parquet or \.jsonl files")
    refused(tmp_path / "nowhere", "zoo", "has neither")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    refused(empty, str(empty), "holds no records")
    parquet.write_table(pyarrow.table({"text": ["of another kind"]}), tmp_path / "other.parquet")
    refused(tmp_path / "other.parquet", "other.parquet.0.metadata", "is missing")
    shutil.copytree(exported, tmp_path / "json")
    (tmp_path / "json" / "patterns.json").write_text('{"patterns": [{"name": "palindrome"}]}')
    refused(
        tmp_path / "json",
        "train-000000.parquet.0.metadata.selected_patterns",
        "sorted_ascending is none of the patterns",
    )
    (tmp_path / "json" / "patterns.json").unlink()
    baseline = json.loads((tmp_path / "json" / "baseline_dataset.json").read_text())
    (tmp_path / "json" / "baseline_dataset.json").write_text(json.dumps(baseline | {"vocab_size": 9}))
    refused(tmp_path / "json", "baseline_dataset.json.vocab_size", "is 9")


def test_patterns_that_no_zoo_can_have_are_refused_as_an_import_refuses_them(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "json")
    patterns = json.loads((tmp_path / "json" / "patterns.json").read_text())["patterns"]
    patterns.append({"name": "mine", "regex": "B.*"})
    (tmp_path / "json" / "patterns.json").write_text(json.dumps({"patterns": patterns}))
    told = []
    for read in (open_zoo, lambda source: import_json(source, tmp_path / "imported")):
        with pytest.raises(InvalidInput, match="are the same set") as caught:
            read(tmp_path / "json")
        told.append(caught.value.violations)
    assert told[0] == told[1]


def test_the_records_say_what_they_are_of(exported: Path) -> None:
    records = JsonRecords(exported)
    assert len(records) == 24 and records.baseline == exported
    index, record = list(records)[1]
    assert (index, record.patterns) == (3, ["starts_with(B)", "sorted_ascending"])

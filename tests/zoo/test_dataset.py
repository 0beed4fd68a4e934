"""A zoo on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, PatternSpec, SignatureSpec, SubjectSpec
from services.zoo.dataset import Zoo
from services.zoo.patterns import from_specs
from services.zoo.pools import probes
from services.zoo.subjects import Architecture, activations, flatten, init
from services.zoo.universe import Universe

SPEC = GenerationSpec(
    vocab_size=5,
    sequence_length=4,
    patterns=[PatternSpec(name="palindrome"), PatternSpec(name="starts_with", token="B")],
    subject=SubjectSpec.model_validate({"layers": 1, "neurons": 3}),
    signature=SignatureSpec(probes=6),
)


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    architecture = Architecture(5, 4, SPEC.subject.input_encoding, (3,), "relu")
    universe = Universe(5, 4, from_specs(SPEC.patterns, 5, 4))
    networks = [(architecture, row) for row in flatten(init(architecture, torch.arange(4)))]
    chosen = probes(universe, 6)
    labels = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    accuracy = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    return Zoo.of_shapes(SPEC, torch.tensor([0, 2, 5, 9]), networks, labels=labels, accuracy=accuracy, probes=chosen)


def test_round_trip(zoo: Zoo, tmp_path: Path) -> None:
    zoo.save(tmp_path)
    back = Zoo.load(tmp_path)
    assert len(back) == 4 and back.spec == zoo.spec and back.patterns == zoo.patterns
    assert list(back.params) == list(zoo.params)
    for name in ("index", "labels", "accuracy", "probes", "signatures"):
        assert torch.equal(getattr(back, name), getattr(zoo, name)), name
    assert all(torch.equal(back.params[name], zoo.params[name]) for name in zoo.params)
    assert torch.equal(torch.cat(activations(back.params, back.probe_inputs), 2).transpose(1, 2), back.signatures)


def test_an_empty_selection_keeps_its_shape(zoo: Zoo, tmp_path: Path) -> None:
    none = replace(zoo, labels=torch.zeros(4, 2, dtype=torch.bool))
    none.save(tmp_path)
    assert Zoo.load(tmp_path).labels.tolist() == [[False, False]] * 4


def test_records_load_through_datasets(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import load_dataset

    zoo.save(tmp_path)
    cache = str(tmp_path / "cache")
    table = load_dataset("parquet", data_dir=str(tmp_path / "data"), split="train", cache_dir=cache)
    assert table["patterns"][2] == ["palindrome", "starts_with(B)"]
    assert table["accuracy"][0] == pytest.approx(zoo.accuracy[0].tolist())
    assert table["weights"][1] == pytest.approx(flatten(zoo.params)[1].tolist())
    assert len(table["signature"][0]["raw"]) == 6 * 4


def test_wrong_folders_name_the_file(zoo: Zoo, tmp_path: Path) -> None:
    def refused(field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            Zoo.load(tmp_path)
        assert caught.value.violations[0].field == field

    refused("zoo.json")
    zoo.save(tmp_path)
    records = tmp_path / "data" / "train-000000.parquet"
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    refused("data/train-000000.parquet")
    records.unlink()
    refused("data")
    zoo.save(tmp_path)
    about = json.loads((tmp_path / "zoo.json").read_text())
    (tmp_path / "zoo.json").write_text(json.dumps({**about, "format": 99}))
    refused("zoo.json")
    (tmp_path / "zoo.json").write_text(json.dumps(about))
    table = parquet.read_table(records)
    column = table.schema.get_field_index("neurons")
    parquet.write_table(table.set_column(column, "neurons", pyarrow.array([4] * len(table), pyarrow.int32())), records)
    refused("data.weights")
    table = table.slice(0, 2)
    for name, value, field in (
        ("activation", "swish", "data.activation"),
        ("layers", 0, "data.layers"),
        ("neurons", None, "data.neurons"),
        ("patterns", None, "data.patterns"),
        ("patterns", [None], "data.patterns"),
        ("weights", None, "data.weights"),
    ):
        column = table.schema.get_field_index(name)
        values = pyarrow.array([value] * 2, table.schema.field(name).type)
        parquet.write_table(table.set_column(column, name, values), records)
        refused(field)
    parquet.write_table(table.drop_columns(["patterns"]), records)
    refused("data/train-000000.parquet")
    parquet.write_table(table.slice(0, 0), records)
    refused("data")
    (tmp_path / "zoo.json").write_text("[]")
    refused("zoo.json")


def test_a_baseline_of_another_zoo_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    zoo.save(tmp_path)
    baseline = json.loads((tmp_path / "baseline_dataset.json").read_text())
    assert baseline["sequences"][0].keys() == {"sequence", "patterns"}

    def refused(wrong: dict[str, object], field: str) -> None:
        (tmp_path / "baseline_dataset.json").write_text(json.dumps(wrong))
        with pytest.raises(InvalidInput) as caught:
            Zoo.load(tmp_path)
        assert caught.value.violations[0].field == f"baseline_dataset.json{field}"

    refused({**baseline, "vocab_size": 6}, ".vocab_size")
    refused({**baseline, "sequence_length": 5}, ".sequence_length")
    refused({**baseline, "sequences": baseline["sequences"][:5]}, ".sequences")
    refused({**baseline, "sequences": [{"sequence": "AAAF"}]}, ".sequences.0")
    refused({**baseline, "sequences": [{"sequence": "AAA"}]}, ".sequences.0")
    refused({}, "")


def test_a_zoo_from_elsewhere_is_checked_and_made_ours(zoo: Zoo, tmp_path: Path) -> None:
    replace(zoo, weights=zoo.weights.double(), probes=zoo.probes.int()).save(tmp_path)
    back = Zoo.load(tmp_path)
    assert {tensor.dtype for tensor in (*back.params.values(), back.signatures)} == {torch.float32}
    assert torch.equal(back.probes, zoo.probes)
    replace(zoo, accuracy=zoo.accuracy[:, :2]).save(tmp_path)
    with pytest.raises(InvalidInput) as caught:
        Zoo.load(tmp_path)
    assert caught.value.violations[0].field == "data.accuracy"
    zoo.save(tmp_path)
    about = json.loads((tmp_path / "zoo.json").read_text())
    about["spec"]["patterns"] = [{"name": "palindrome"}, {"name": "all_same"}]
    (tmp_path / "zoo.json").write_text(json.dumps(about))
    with pytest.raises(InvalidInput, match=r"starts_with\(B\) is no pattern"):
        Zoo.load(tmp_path)

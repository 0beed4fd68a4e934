"""The form with JSON text in its columns: written, read back, and read as others write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from datasets import load_dataset
from pyarrow import parquet

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, PatternSpec
from services.generation.json_form import export_json, import_json
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.report import write_report
from services.generation.score import means, score_answers
from services.zoo.dataset import read_about
from services.zoo.subjects import init
from tests.generation.conftest import records, small_spec, staged_spec

COLUMNS = {
    "example_id",
    "metadata",
    "modification_prompt",
    "modification_completion",
    "modification_text",
    "classification_prompt",
    "classification_completion",
    "classification_text",
    "degraded_signature",
    "improved_signature",
    "degraded_model_weights",
    "improved_model_weights",
    "training_metrics",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json") / "zoo"
    spec = staged_spec(subjects=12, signature={"probes": 12, "methods": ["mean", "raw"]})
    DatasetGenerationPipeline(spec).run(folder)
    return folder


@pytest.fixture(scope="module")
def exported(zoo: Path) -> Path:
    export_json(zoo, zoo.with_name("exported"))
    return zoo.with_name("exported")


def test_what_is_written_is_what_such_sets_have(zoo: Path, exported: Path, tmp_path: Path) -> None:
    table = load_dataset("parquet", data_dir=str(exported / "data"), cache_dir=str(tmp_path))["train"]
    assert set(table.column_names) == COLUMNS and len(table) == 12
    own = records(zoo)
    for row, record in zip(table, own, strict=True):
        metadata, weights = json.loads(row["metadata"]), json.loads(row["improved_model_weights"])
        assert metadata["selected_patterns"] == record["patterns"]
        assert metadata["target_pattern"] == record["target_pattern"]
        assert weights["config"]["num_layers"] == record["layers"]
        names = [f"network.{2 * layer}.{part}" for layer in range(record["layers"] + 1) for part in ("weight", "bias")]
        assert list(weights["weights"]) == names
        assert np.array(weights["weights"]["network.0.weight"]).shape == (record["neurons"], 20)
        signature = json.loads(row["degraded_signature"])["neuron_activations"]
        assert len(signature) == record["layers"] + 1
        profile = signature["0"]["neuron_profiles"]["0"]
        assert profile["mean"] == record["degraded_signature"]["mean"][0] and len(profile["raw"]) == 12
        assert row["modification_text"] == row["modification_prompt"] + row["modification_completion"]
        assert set(json.loads(row["training_metrics"])) == {"degraded", "improved"}
        target = [pattern.name for pattern in read_about(zoo)[2]].index(record["target_pattern"])
        for name, of in (("degraded", "degraded_accuracy"), ("improved", "accuracy")):
            assert metadata[f"{name}_target_accuracy"] == record[of][target]
            assert metadata[f"{name}_mean_accuracy"] == metadata[f"{name}_accuracy"] == np.mean(record[of])
        for name, old in (("target", metadata["improvement"]), ("mean", metadata["improved_accuracy"])):
            gain = metadata[f"improved_{name}_accuracy"] - metadata[f"degraded_{name}_accuracy"]
            assert metadata[f"{name}_improvement"] == gain
            assert old == pytest.approx(gain if name == "target" else np.mean(record["accuracy"]), abs=1e-6)


def test_there_and_back(zoo: Path, exported: Path, tmp_path: Path) -> None:
    patterns = GenerationSpec.model_validate(read_about(zoo)[0]["spec"]).patterns
    import_json(exported, tmp_path / "back", patterns=patterns)
    before, after = records(zoo), records(tmp_path / "back")
    for old, new in zip(before, after, strict=True):
        for name in ("patterns", "target_pattern", "layers", "neurons", "activation", "weights", "degraded_weights"):
            assert new[name] == old[name]
        assert new["learning_rate"] == pytest.approx(old["learning_rate"])
        # The same networks, judged on the same sequences and described on the same probes.
        assert new["signature"]["raw"] == pytest.approx(np.reshape(old["signature"]["raw"], (-1)), abs=1e-5)
    figures = [np.array([row["accuracy"] for row in rows]) for rows in (before, after)]
    # Held-out sequences are drawn with the seed of the spec, which this form does not have.
    assert np.abs(figures[0] - figures[1]).mean() < 0.05
    assert read_about(tmp_path / "back")[0]["imported"]


def test_a_zoo_of_one_stage(tmp_path: Path) -> None:
    DatasetGenerationPipeline(small_spec(subjects=4)).run(tmp_path / "zoo")
    export_json(tmp_path / "zoo", tmp_path / "out")
    import_json(tmp_path / "out", tmp_path / "back", patterns=small_spec().patterns)
    before, after = records(tmp_path / "zoo"), records(tmp_path / "back")
    for name in ("weights", "training_loss", "validation_loss", "learning_rate"):
        assert [row[name] for row in before] == [row[name] for row in after]
    assert "degraded_weights" not in after[0] and before[0]["training_loss"]
    (row, *_) = parquet.read_table(tmp_path / "out" / "data").to_pylist()
    metadata = json.loads(row["metadata"])
    assert (
        metadata["improved_mean_accuracy"] == metadata["improved_accuracy"] and metadata["target_improvement"] is None
    )


def published(**changes: Any) -> dict[str, Any]:
    """A record as others write it: index inputs, modules numbered with dropout between them, some columns missing."""
    from services.zoo.subjects import Architecture

    shape = Architecture(10, 5, "index", (8,) * 5, "relu")
    params = init(shape, torch.tensor([7]))
    weights = {
        f"network.{3 * layer}.{part}": params[f"layers.{layer}.{part}"][0].tolist()
        for layer in range(6)
        for part in ("weight", "bias")
    }
    config: dict[str, Any] = {
        "vocab_size": 10,
        "sequence_length": 5,
        "num_layers": 5,
        "neurons_per_layer": 8,
        "activation_type": "relu",
    }
    row = {
        "example_id": 0,
        "metadata": json.dumps({"target_pattern": "palindrome", "selected_patterns": ["palindrome", "no_repeats"]}),
        "improved_model_weights": json.dumps({"config": config, "weights": weights}),
        "degraded_model_weights": json.dumps({"config": config, "weights": weights}),
    }
    return row | changes


def test_a_published_set_is_read(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(published(example_id=i)) for i in range(3)))
    figures = import_json(file, tmp_path / "zoo")
    assert figures["subjects"] == 3
    (row, *_) = records(tmp_path / "zoo")
    assert (row["layers"], row["neurons"], len(row["weights"])) == (5, 8, 345)
    about = read_about(tmp_path / "zoo")[1]
    assert about.subject.input_encoding == "index" and {one.name for one in about.patterns} == {
        "palindrome",
        "no_repeats",
    }
    raw = np.array(row["signature"]["raw"]).reshape(41, -1)
    assert raw.shape[1] == 128 and raw.std() > 0


@pytest.mark.parametrize("regex", ["ABCDE", "ABC[A-F]J", "A[A-J]CDE"])
def test_patterns_that_are_too_rare_to_train_are_imported(regex: str, tmp_path: Path) -> None:
    metadata = json.dumps({"selected_patterns": ["palindrome", "tiny"], "target_pattern": "tiny"})
    (tmp_path / "train.jsonl").write_text(json.dumps(published(metadata=metadata)))
    patterns = [PatternSpec(name="palindrome"), PatternSpec(name="tiny", regex=regex)]
    figures = import_json(tmp_path / "train.jsonl", tmp_path / "zoo", patterns=patterns)
    # No sequence of the first is held out.
    unknown = regex == "ABCDE"
    assert (figures["accuracy_by_pattern"]["tiny"] is None) == (figures["improvement"] is None) == unknown
    export_json(tmp_path / "zoo", tmp_path / "out")
    (row,) = parquet.read_table(tmp_path / "out" / "data").to_pylist()
    found = json.loads(row["metadata"], parse_constant=pytest.fail)
    names = ("improvement", "target_improvement", "degraded_target_accuracy", "improved_target_accuracy")
    assert {found[name] is None for name in names} == {unknown}
    write_report(tmp_path / "zoo", tmp_path / "report")
    json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=pytest.fail)
    page = re.sub('src="[^"]*"', "", (tmp_path / "report" / "report.html").read_text())
    assert "nan " not in page and "nan<" not in page
    weights = json.dumps({"layers": [[]]})
    answers = [{"index": 0, "task": "modification", "completion": weights}]
    assert (means(score_answers(tmp_path / "zoo", answers))["modification"]["reference_gain"] is None) == unknown
    # To train them is another matter.
    training = small_spec(
        patterns=[PatternSpec(name="tiny", regex="ABCD"), PatternSpec(name="palindrome")], max_patterns_per_batch=1
    )
    with pytest.raises(InvalidInput, match="tiny has 1 sequences, too few to train and judge on"):
        DatasetGenerationPipeline(training).run(tmp_path / "none")


def test_names_are_given_a_meaning(tmp_path: Path) -> None:
    metadata = json.dumps({"selected_patterns": ["starts_with"], "target_pattern": "starts_with"})
    file = tmp_path / "set.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([published(metadata=metadata)]), file)
    with pytest.raises(InvalidInput, match="starts_with is not a built-in pattern; define it with patterns"):
        import_json(file, tmp_path / "zoo")
    patterns = [PatternSpec(name="starts_with", token="C"), PatternSpec(name="no_repeats")]
    import_json(
        file,
        tmp_path / "zoo",
        patterns=patterns,
    )
    assert records(tmp_path / "zoo")[0]["patterns"] == ["starts_with(C)"]
    own = [PatternSpec(name="mine", regex="C.*"), PatternSpec(name="no_repeats")]
    import_json(file, tmp_path / "mine", patterns=own, rename={"starts_with": "mine"})
    assert records(tmp_path / "mine")[0]["patterns"] == ["mine"]
    with pytest.raises(InvalidInput, match="starts_with is none of the patterns: mine, no_repeats"):
        import_json(file, tmp_path / "none", patterns=own)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"metadata": "{"}, "metadata"),
        ({"metadata": json.dumps({"selected_patterns": []})}, "metadata.selected_patterns"),
        ({"improved_model_weights": None}, "improved_model_weights"),
        ({"improved_model_weights": json.dumps({"weights": {}})}, "improved_model_weights"),
        (
            {"improved_model_weights": json.dumps({"config": {}, "weights": {"network.0.weight": [[1, 2], [3]]}})},
            "improved_model_weights.weights.network.0.weight",
        ),
        (
            {"improved_model_weights": published()["improved_model_weights"].replace('"vocab_size": 10, ', "")},
            "improved_model_weights.config",
        ),
        (
            {
                "improved_model_weights": published()["improved_model_weights"].replace(
                    "network.9.bias", "network.8.bias"
                )
            },
            "improved_model_weights.weights.network.8",
        ),
    ],
)
def test_a_record_that_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in (published(), published(**changes))))
    with pytest.raises(InvalidInput) as caught:
        import_json(file, tmp_path / "zoo")
    assert caught.value.violations[0].field == f"train.jsonl.1.{field}"
    assert not (tmp_path / "zoo").exists()


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="neither a file nor a folder"):
        import_json(tmp_path / "nothing", tmp_path / "zoo")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(InvalidInput, match="cannot be read"):
        import_json(tmp_path / "bad.parquet", tmp_path / "zoo")


def test_two_patterns_of_one_kind_and_what_is_known_of_the_training(tmp_path: Path) -> None:
    patterns = [
        {"name": "starts_with", "token": "A"},
        {"name": "sorted_descending"},
        {"name": "starts_with", "token": "B"},
    ]
    spec = staged_spec({"corruption_rate": 0.6}, subjects=10, patterns=patterns, max_patterns_per_batch=2)
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    export_json(tmp_path / "zoo", tmp_path / "out")
    import_json(tmp_path / "out", tmp_path / "back")
    before, after = records(tmp_path / "zoo"), records(tmp_path / "back")
    for name in ("index", "patterns", "target_pattern", "learning_rate", "epochs", "validation_loss", "weights"):
        assert [row[name] for row in before] == [row[name] for row in after], name
    staged = read_about(tmp_path / "back")[1].staged
    assert staged is not None and staged.corruption_rate == 0.6
    # Without what says which they are, the bare name is one of two.
    (tmp_path / "out" / "patterns.json").unlink()
    names = {"starts_with(A)": "starts_with", "starts_with(B)": "starts_with"}
    own = [PatternSpec.model_validate(pattern) for pattern in patterns]
    with pytest.raises(InvalidInput, match="starts_with is none of the patterns"):
        import_json(tmp_path / "out", tmp_path / "none", patterns=own, rename=names)


def test_what_is_not_known_stays_unknown(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(published()))
    import_json(file, tmp_path / "zoo")
    (row,) = records(tmp_path / "zoo")
    assert row["learning_rate"] is None and row["epochs"] == row["validation_loss"] == []
    export_json(tmp_path / "zoo", tmp_path / "out")
    (again,) = parquet.read_table(tmp_path / "out" / "data").to_pylist()
    assert json.loads(again["training_metrics"]) == {}
    file.write_text(json.dumps(published(metadata=json.dumps({"selected_patterns": ["palindrome"]}))))
    with pytest.raises(InvalidInput) as caught:
        import_json(file, tmp_path / "untold")
    assert caught.value.violations[0].field == "train.jsonl.0.metadata.target_pattern"


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"relu"', '"silu"', "config"),
        ('"vocab_size": 10', '"vocab_size": 10, "dropout_rate": "low"', "config.dropout_rate"),
        ('"vocab_size": 10', '"vocab_size": 10, "dropout_rate": 0.95', "config.dropout_rate"),
        ('"sequence_length": 5', '"sequence_length": 6', "config"),
    ],
)
def test_configs_of_all_sorts(tmp_path: Path, old: str, new: str, field: str) -> None:
    file = tmp_path / "train.jsonl"
    weights = published()["improved_model_weights"].replace(old, new)
    file.write_text(json.dumps(published(improved_model_weights=weights)))
    with pytest.raises(InvalidInput) as caught:
        import_json(file, tmp_path / "zoo")
    assert caught.value.violations[0].field == f"train.jsonl.0.improved_model_weights.{field}"


@pytest.mark.parametrize("line", ["[]", "3", "{"])
def test_lines_that_are_no_records(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.jsonl").write_text(line)
    with pytest.raises(InvalidInput, match=r"train\.jsonl"):
        import_json(tmp_path / "train.jsonl", tmp_path / "zoo")


def test_a_precision_that_there_is_not(tmp_path: Path) -> None:
    metadata = {"selected_patterns": ["palindrome"], "target_pattern": "palindrome", "precision": "float64"}
    (tmp_path / "train.jsonl").write_text(json.dumps(published(metadata=json.dumps(metadata))))
    with pytest.raises(InvalidInput, match=r"records\.subject\.precision"):
        import_json(tmp_path / "train.jsonl", tmp_path / "zoo")

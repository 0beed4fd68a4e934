"""Whatever zoo can be loaded can be saved and loaded again, equal, and reported on and exported."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.generation.json_form import export_json, import_json
from services.generation.pipeline import DatasetGenerationPipeline, generate
from services.generation.report import write_report
from services.zoo.dataset import Zoo
from services.zoo.source import open_zoo
from services.zoo.statistics import Statistics
from tests.generation.conftest import ANYTHING, PATTERNS, records

STAGED = {"examples": 16, "batch_size": 8, "epochs": 1, "improvement_epochs": 1, **ANYTHING}
stages: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {"training": {"steps": 2, "batch_size": 8}},
        {"training": {"steps": 2, "batch_size": 8, "learning_rate": {"min": 1e-3, "max": 1e-2}}},
        {"staged": STAGED},
        {"training": {"steps": 2, "batch_size": 8}, "counterfactual": {"steps": 2}},
    ]
)
subjects = st.fixed_dictionaries(
    {
        "layers": st.sampled_from([1, {"min": 1, "max": 2}]),
        "neurons": st.sampled_from([4, {"min": 3, "max": 5}]),
        "activations": st.sampled_from([["relu"], ["gelu", "tanh"]]),
        "quantization": st.sampled_from(["none", "int8", "ternary"]),
        "dropout": st.sampled_from([0.0, {"min": 0.1, "max": 0.3}]),
    }
)
methods = st.sampled_from([["raw"], ["mean", "std"], ["pca", "raw"]])


def spec_of(stage: dict[str, Any], subject: dict[str, Any], method: list[str], *, prompts: bool) -> GenerationSpec:
    return GenerationSpec.model_validate(
        {
            "subjects": 5,
            "vocab_size": 5,
            "sequence_length": 4,
            "patterns": [pattern.model_dump() for pattern in PATTERNS],
            "max_patterns_per_batch": 3,
            "min_accuracy": 0.0,
            "subject": subject,
            "signature": {"probes": 8, "methods": method},
            "format": {"digits": 3} if prompts else None,
            **stage,
        }
    )


def same(one: Zoo, other: Zoo) -> None:
    assert one.spec == other.spec and one.patterns == other.patterns and one.layout.shapes == other.layout.shapes
    assert one.digest == other.digest
    facts = [{name: fact for name, fact in zoo.facts.items() if name != "format"} for zoo in (one, other)]
    assert facts[0] == facts[1]
    for name in ("index", "shape", "weights", "labels", "accuracy", "probes", "signatures"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
    tables = []
    for zoo in (one, other):
        rest = zoo.read_rest()
        assert isinstance(rest, pyarrow.Table)
        tables.append(rest.to_pylist())
    assert tables[0] == tables[1]


def works(folder: Path, scratch: Path, figures: dict[str, Any]) -> None:
    """The zoo in ``folder`` has these figures, and is reported on and exported."""
    assert Statistics.of(folder).figures() == figures
    write_report(folder, scratch / "report")
    export_json(folder, scratch / "json")


@given(stages, subjects, methods, st.booleans())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_what_was_loaded_is_saved(
    stage: dict[str, Any], subject: dict[str, Any], method: list[str], prompts: bool
) -> None:
    with TemporaryDirectory() as name:
        folder, scratch = Path(name, "zoo"), Path(name)
        figures = DatasetGenerationPipeline(spec_of(stage, subject, method, prompts=prompts)).run(folder)
        zoo = Zoo.load(folder)
        zoo.save(scratch / "saved")
        assert zoo.rest == folder, "read again when it is needed, not held"
        same(Zoo.load(scratch / "saved"), zoo)
        works(scratch / "saved", scratch, figures)
        before, after = records(folder), records(scratch / "saved")
        assert [row.keys() for row in before] == [row.keys() for row in after]
        # Records from elsewhere, imported or read as they are.
        import_json(scratch / "json", scratch / "imported")
        for number, other in enumerate((Zoo.load(scratch / "imported"), open_zoo(scratch / "json"))):
            other.save(scratch / str(number))
            same(Zoo.load(scratch / str(number)), other)
            works(scratch / str(number), scratch / f"of-{number}", Statistics.of(scratch / "imported").figures())


def test_a_zoo_in_memory_is_saved_after_its_folder_is_gone(tmp_path: Path) -> None:
    zoo = generate(spec_of({"staged": STAGED}, {"layers": 1, "neurons": 4}, ["raw"], prompts=True))
    zoo.save(tmp_path / "saved")
    same(Zoo.load(tmp_path / "saved"), zoo)
    assert records(tmp_path / "saved")[0]["modification_prompt"]


def test_what_a_zoo_does_not_have_is_not_made_up(tmp_path: Path) -> None:
    zoo = generate(spec_of({"staged": STAGED}, {"layers": 1, "neurons": 4}, ["raw"], prompts=False))
    zoo.rest = None
    with pytest.raises(InvalidInput, match="is not known of subject") as caught:
        zoo.save(tmp_path / "saved")
    assert caught.value.violations[0].field == "zoo.degraded_accuracy" and not (tmp_path / "saved").exists()


def test_records_of_two_zoos_are_not_mixed(tmp_path: Path) -> None:
    zoo = generate(spec_of({"training": {"steps": 1, "batch_size": 8}}, {"layers": 1, "neurons": 4}, [], prompts=False))
    zoo.save(tmp_path)
    (tmp_path / "data" / "train-000000.parquet").rename(tmp_path / "data" / "train-000001.parquet")
    with pytest.raises(InvalidInput, match=r"holds train-000001\.parquet already; save into a new folder"):
        zoo.save(tmp_path)


def test_records_without_networks_of_the_spec_are_named(tmp_path: Path) -> None:
    """As an earlier version saved a staged zoo."""
    zoo = generate(spec_of({"staged": STAGED}, {"layers": 1, "neurons": 4}, ["raw"], prompts=False))
    zoo.save(tmp_path / "zoo")
    (file,) = (tmp_path / "zoo" / "data").iterdir()
    parquet.write_table(parquet.read_table(file).drop_columns(["degraded_weights"]), file)
    with pytest.raises(InvalidInput, match="is missing, though the spec asks for it") as caught:
        export_json(tmp_path / "zoo", tmp_path / "json")
    assert caught.value.violations[0].field == "data.degraded_weights"
    assert json.loads((tmp_path / "zoo" / "zoo.json").read_text())["spec"]["staged"]

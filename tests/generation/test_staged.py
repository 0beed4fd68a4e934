"""Staged training: degraded on one pattern, then improved; shapes of all sorts; checks; records on disk."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from benchmarks._plain import PlainLoop
from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.generation import buckets, pipeline, progress
from services.generation.buckets import BucketTrainer
from services.generation.checks import degradation, improvement
from services.generation.data import Candidates
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.sampler import PatternDatasetSampler
from services.runtime.run import Stopped
from services.zoo.dataset import Zoo, read_records
from services.zoo.subjects import Architecture, encode, forward, unflatten
from services.zoo.universe import HELD_OUT, TRAIN, VALIDATION
from tests.generation.conftest import PATTERNS
from tests.recorder import Recorder


def staged_spec(staged: dict[str, Any] | None = None, **changes: Any) -> GenerationSpec:
    fields: dict[str, Any] = {
        "seed": 5,
        "subjects": 30,
        "vocab_size": 5,
        "sequence_length": 4,
        "patterns": [pattern.model_dump() for pattern in PATTERNS],
        "min_patterns_per_batch": 2,
        "max_patterns_per_batch": 3,
        "subject": {
            "layers": {"min": 1, "max": 3},
            "neurons": {"min": 6, "max": 12},
            "activations": ["relu", "gelu"],
            "init": "independent",
            "weight_init": "kaiming",
        },
        "staged": {"examples": 96, "batch_size": 32, "learning_rate": {"min": 5e-3, "max": 2e-2}, **(staged or {})},
        "signature": {"probes": 12, "methods": ["mean", "std"]},
    }
    return GenerationSpec.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A staged zoo and its figures."""
    folder = tmp_path_factory.mktemp("staged") / "zoo"
    return folder, DatasetGenerationPipeline(staged_spec()).run(folder)


def records(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.concat_tables(read_records(folder)).to_pylist()
    return rows


def test_records_are_what_was_asked_for(made: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = made
    rows, spec = records(folder), staged_spec()
    assert len(rows) == figures["subjects"] == 30
    assert [row["index"] for row in rows] == sorted({row["index"] for row in rows})
    assert {row["layers"] for row in rows} == {1, 2, 3}
    assert {row["activation"] for row in rows} == {"relu", "gelu"}
    assert len({row["neurons"] for row in rows}) > 3
    assert figures["candidates"] >= 30 + sum(figures["rejected"].values())
    # The sequences that a subject is accepted by are not those on which its improvement is measured.
    assert spec.staged is not None
    assert np.mean([row["improvement"] for row in rows]) >= spec.staged.min_degradation_threshold
    for row in rows:
        assert row["target_pattern"] in row["patterns"]
        assert 6 <= row["neurons"] <= 12 and 5e-3 <= row["learning_rate"] <= 2e-2
        neurons = row["layers"] * row["neurons"] + 1
        for signature in (row["signature"], row["degraded_signature"]):
            assert {name: len(values) for name, values in signature.items()} == {"mean": neurons, "std": neurons}


def test_weights_and_accuracies_belong_together(made: tuple[Path, dict[str, Any]]) -> None:
    """The networks of the records, rebuilt from their own columns, do on held-out sequences what the records say."""
    sampler = PatternDatasetSampler(staged_spec())
    names = [pattern.name for pattern in sampler.patterns]
    for row in records(made[0]):
        shape = Architecture(5, 4, "one_hot", (row["neurons"],) * row["layers"], row["activation"])
        selected = torch.tensor([[name in row["patterns"] for name in names]])
        questions, labels = encode(shape, sampler.evaluation.sequences), sampler.evaluation.labels(selected)
        for weights, accuracy in (("weights", "accuracy"), ("degraded_weights", "degraded_accuracy")):
            params = unflatten(torch.tensor([row[weights]]), shape)
            right = (forward(params, questions, row["activation"]) > 0) == labels
            expected = torch.tensor([row[accuracy]])
            torch.testing.assert_close(sampler.evaluation.by_stratum(right), expected, rtol=0, atol=0.02)
        target = names.index(row["target_pattern"])
        gain = row["accuracy"][target] - row["degraded_accuracy"][target]
        assert row["improvement"] == pytest.approx(gain, abs=1e-6)


def test_a_subject_equals_a_plain_pytorch_loop(tmp_path: Path) -> None:
    """Two epochs a stage, so that rounding has no time to grow."""
    spec = staged_spec({"epochs": 2, "improvement_epochs": 2, "min_degradation_threshold": 0.0, "max_instability": 1.0})
    spec = spec.model_copy(update={"subjects": 12})
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    plain = PlainLoop(spec)
    for row in records(tmp_path / "zoo"):
        alone = plain.subject(row["index"])
        assert alone is not None
        assert alone.accuracy == pytest.approx(row["accuracy"], abs=0.02)
        np.testing.assert_allclose(np.array(alone.weights), np.array(row["weights"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_whatever_the_scheduling(made: tuple[Path, dict[str, Any]], tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        DatasetGenerationPipeline(staged_spec()).run(tmp_path / "again")
    finally:
        torch.set_num_threads(before)
    assert records(tmp_path / "again") == records(made[0])


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_TOGETHER", 32)
    monkeypatch.setattr(pipeline, "SHARD", 256)
    spec = staged_spec().model_copy(update={"subjects": 400})
    figures = DatasetGenerationPipeline(spec).run(tmp_path / "whole")
    stopped = Recorder(tmp_path / "checkpoints", every=True, stop_after=2)
    with pytest.raises(Stopped):
        DatasetGenerationPipeline(spec).run(tmp_path / "stopped", stopped)
    resumed = Recorder(resume=stopped.checkpoints[-1])
    assert DatasetGenerationPipeline(spec).run(tmp_path / "resumed", resumed) == figures
    assert records(tmp_path / "resumed") == records(tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "data").iterdir())) > 1


def test_a_subjects_dataset_has_wrong_labels_on_its_target_alone() -> None:
    spec = staged_spec({"examples": 4000, "corruption_rate": 0.25})
    sampler = PatternDatasetSampler(spec)
    for index in range(4):
        dataset, right, wrong = sampler.training(index)
        own = Candidates.draw(spec, torch.tensor([index]), 4)
        target = int(own.target[0])
        assert bool(own.selected[0, target])
        assert torch.equal(right, (dataset.membership & own.selected[0]).any(1))
        flipped = right != wrong
        assert not flipped[~dataset.membership[:, target]].any()
        share = float(flipped[dataset.membership[:, target]].float().mean())
        assert abs(share - 0.25) < 0.05
        assert (sampler.universe.split_of(dataset.sequences) == TRAIN).all()
        assert abs(float(right.float().mean()) - 0.5) < 0.12


def test_a_stage_ends_when_it_gets_no_better(tmp_path: Path) -> None:
    quick = {"epochs": 60, "improvement_epochs": 60, "patience": 2}
    spec = staged_spec({**quick, "min_degradation_threshold": 0.0, "max_instability": 1.0})
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    epochs = np.array([row["epochs"] for row in records(tmp_path / "zoo")])
    assert epochs.min() >= 3 and (epochs[:, 0] < 60).any()


def test_the_three_checks() -> None:
    spec = staged_spec({"min_degradation_threshold": 0.1, "min_specificity": 0.05, "max_instability": 0.1})
    assert spec.staged is not None
    own = Candidates.draw(spec, torch.zeros(7, dtype=torch.int64), 4)
    both = torch.tensor([[True, True, False, False]]).expand(7, -1)
    own = replace(own, selected=both, target=torch.zeros(7, dtype=torch.int64))
    before = torch.full((7, 5), 0.5)
    gains = torch.tensor(
        [
            [0.30, 0.00, 0.00, 0.00, 0.00],
            [0.05, 0.00, 0.00, 0.00, 0.00],
            [0.30, 0.30, 0.30, 0.30, 0.30],
            [0.30, -0.15, 0.0, 0.00, 0.00],
            [0.30, -0.05, 0.0, 0.00, -0.2],
            [0.30, 0.00, -0.2, -0.2, -0.2],
            [0.10, -0.1, 0.0, 0.00, 0.00],
        ]
    )
    causes = [None, "magnitude", "specificity", "stability", None, "stability", None]
    assert improvement(before, before + gains + 1e-6, own, spec.staged) == causes
    early = degradation(torch.tensor([[0.95] * 5] * 3 + [[0.85] * 5] * 4), own, spec.staged)
    assert early == ["too little degraded"] * 3 + [None] * 4


def test_what_cannot_be_met_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_TOGETHER", 32)
    monkeypatch.setattr(progress, "PATIENCE", 32)
    hopeless = staged_spec({"corruption_rate": 0.0, "min_degradation_threshold": 0.9})
    with pytest.raises(InvalidInput, match="lower min_degradation_threshold") as caught:
        DatasetGenerationPipeline(hopeless).run(tmp_path / "zoo")
    assert caught.value.violations[0].field == "spec.staged"


def test_networks_of_many_shapes_load_as_one_zoo(made: tuple[Path, dict[str, Any]]) -> None:
    zoo = Zoo.load(made[0])
    for row, record in enumerate(records(made[0])[:20]):
        which = int(zoo.shape[row])
        shape = zoo.layout.shapes[which]
        assert (len(shape.hidden), shape.hidden[0]) == (record["layers"], record["neurons"])
        own = zoo.layout.strip(zoo.weights[row : row + 1], which)[0]
        assert own.tolist() == pytest.approx(record["weights"])
    with pytest.raises(InvalidInput, match="shapes; one is needed"):
        _ = zoo.params


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"subject": {"layers": {"min": 3, "max": 2}}}, "subject.layers"),
        ({"subject": {"neurons": {"min": 0, "max": 2}}}, "subject.neurons"),
        ({"subject": {"layers": 1.5}}, "subject.layers.min"),
        ({"subject": {"dropout": 0.95}}, "subject.dropout"),
        ({"staged_": {"learning_rate": {"min": 1e-2, "max": 1e-3}}}, "staged.learning_rate"),
        ({"training": {"steps": 3}}, ""),
    ],
)
def test_ranges_the_wrong_way_round(changes: dict[str, Any], field: str) -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        staged_spec(changes.get("staged_"), **{k: v for k, v in changes.items() if k != "staged_"})
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == field


@pytest.mark.parametrize("quantization", ["int8", "int4", "ternary", "binary"])
def test_records_hold_the_rounded_networks(tmp_path: Path, quantization: str) -> None:
    subject = staged_spec().subject.model_dump() | {"layers": 2, "neurons": 8, "quantization": quantization}
    checks = {"min_degradation_threshold": 0.0, "max_instability": 1.0, "min_specificity": -1.0}
    spec = staged_spec(checks, subject=subject, subjects=5)
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    levels = {"int8": 255, "int4": 15, "ternary": 3, "binary": 2}[quantization]
    for row in records(tmp_path / "zoo"):
        shape = Architecture(5, 4, "one_hot", (8, 8), row["activation"])
        for column in ("weights", "degraded_weights"):
            params = unflatten(torch.tensor([row[column]]), shape)
            for name, tensor in params.items():
                most = levels if name.endswith("weight") or quantization.startswith("int") else 255
                assert len(set(tensor.flatten().tolist())) <= most, name


def test_datasets_of_all_three_sorts(tmp_path: Path) -> None:
    sampler = PatternDatasetSampler(staged_spec())
    names = {pattern.name for pattern in sampler.patterns}
    benchmark = sampler.benchmark(20, 30)
    assert (sampler.universe.split_of(benchmark.sequences) == HELD_OUT).all()
    assert (sampler.universe.split_of(sampler.baseline.sequences) == VALIDATION).all()
    assert len(sampler.baseline.sequences) == 12
    for file in ("benchmark.json", "benchmark.parquet"):
        sampler.save(benchmark, tmp_path / file)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["sequences"]
    assert rows == parquet.read_table(tmp_path / "benchmark.parquet").to_pylist() == sampler.rows(benchmark)
    for row, own in zip(rows, benchmark.membership.tolist(), strict=True):
        assert len(row["sequence"]) == 4 and set(row["patterns"]) <= names and len(row["patterns"]) == sum(own)


def test_the_widest_may_leave_between_the_stages() -> None:
    trainer = BucketTrainer(staged_spec()).subject_trainer
    own = Candidates.draw(staged_spec(), torch.arange(64), 4)
    own = own.select((own.layers == 2) & (own.activation == 0))
    widest = own.neurons == own.neurons.max()
    assert widest.any() and not widest.all()
    degraded = trainer.degrade(own)
    together = trainer.improve(degraded)
    apart = trainer.improve(degraded.select(~widest))
    for name, weights in apart.params.items():
        torch.testing.assert_close(weights, together.params[name][~widest], rtol=1e-3, atol=1e-4)


def test_what_was_tried_is_counted(tmp_path: Path) -> None:
    made = DatasetGenerationPipeline(staged_spec(subjects=10))
    figures = made.run(tmp_path / "zoo")
    assert figures["subjects"] == 10 and figures["candidates"] % made.bucket_trainer.block_size == 0
    assert figures["candidates"] >= 10 + sum(figures["rejected"].values())


def test_a_pipeline_works_twice(tmp_path: Path) -> None:
    made = DatasetGenerationPipeline(staged_spec(subjects=5))
    assert made.run(tmp_path / "one") == made.run(tmp_path / "two")
    assert records(tmp_path / "one") == records(tmp_path / "two")


def test_checkpoints_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(pipeline, "SHARD", 1)
    monkeypatch.setattr(buckets, "MOST_SHAPES", 1)
    monkeypatch.setattr(buckets, "CACHE_BYTES", 1)
    spec = staged_spec(subjects=60)
    first = Recorder(tmp_path / "checkpoints", every=True, stop_after=2)
    with pytest.raises(Stopped):
        DatasetGenerationPipeline(spec).run(tmp_path / "cut", first)
    DatasetGenerationPipeline(spec).run(tmp_path / "again", Recorder(resume=first.checkpoints[-1]))
    DatasetGenerationPipeline(spec).run(tmp_path / "whole")
    assert records(tmp_path / "again") == records(tmp_path / "whole")

"""Staged training: degraded on one pattern, then improved; shapes of all sorts; checks; records on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from scipy.stats import binomtest

from benchmarks._plain import PlainLoop
from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, StagedSpec, SubjectTrainingSpec
from services.generation import buckets, checks, pipeline, progress
from services.generation import twins as twins_module
from services.generation.buckets import Block, BucketTrainer
from services.generation.checks import degradation, improvement
from services.generation.data import Candidates
from services.generation.json_form import export_json, import_json
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.progress import Progress
from services.generation.report import write_report
from services.generation.sampler import PatternDatasetSampler
from services.generation.workers import Submit, side_by_side, threads
from services.runtime.run import Run, Stopped
from services.zoo.dataset import Zoo, architecture_of, network_of, read_about
from services.zoo.pools import Evaluation
from services.zoo.subjects import Architecture, encode, forward, unflatten
from services.zoo.universe import HELD_OUT, SELECTION, TRAIN, VALIDATION
from tests.generation.conftest import ANYTHING, PATTERNS, records, small_spec, staged_spec
from tests.recorder import Recorder


def test_records_are_what_was_asked_for(staged: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = staged
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


def test_weights_and_accuracies_belong_together(staged: tuple[Path, dict[str, Any]]) -> None:
    """The networks of the records, rebuilt from their own columns, do on held-out sequences what the records say."""
    sampler = PatternDatasetSampler(staged_spec())
    names = [pattern.name for pattern in sampler.patterns]
    for row in records(staged[0]):
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
    spec = staged_spec({"epochs": 2, "improvement_epochs": 2, **ANYTHING})
    spec = spec.model_copy(update={"subjects": 12})
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    rows = records(tmp_path / "zoo")
    plain = PlainLoop(spec).subjects(torch.tensor([row["index"] for row in rows]))
    for row, alone in zip(rows, plain, strict=True):
        assert alone.candidate == row["index"]
        assert alone.accuracy == pytest.approx(row["accuracy"], abs=0.02)
        np.testing.assert_allclose(np.array(alone.weights), np.array(row["weights"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_whatever_the_scheduling(staged: tuple[Path, dict[str, Any]], tmp_path: Path, workers: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(workers)
    try:
        DatasetGenerationPipeline(staged_spec()).run(tmp_path / "again")
    finally:
        torch.set_num_threads(before)
    assert records(tmp_path / "again") == records(staged[0])


def test_the_next_block_is_in_training_before_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many buckets a block has: at its end, fewer are left than there are workers."""
    submitted: list[int] = []

    @contextmanager
    def noted(trainer: BucketTrainer, networks: int, workers: int) -> Iterator[Submit]:
        with side_by_side(trainer, networks, workers) as submit:

            def note(block: int, part: int) -> Future[Block]:
                submitted.append(block)
                return submit(block, part)

            yield note

    monkeypatch.setattr(pipeline, "side_by_side", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(buckets, "MOST_TOGETHER", 16)
    made = DatasetGenerationPipeline(staged_spec(subjects=1000))
    with closing(made._blocks(Progress())) as blocks:
        next(blocks)
    assert submitted.count(0) > 4
    assert set(submitted) == {0, 1}


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_TOGETHER", 32)
    monkeypatch.setattr(pipeline, "SHARD", 256)
    spec = staged_spec().model_copy(update={"subjects": 200})
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
    spec = staged_spec({**quick, **ANYTHING})
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    epochs = np.array([row["epochs"] for row in records(tmp_path / "zoo")])
    assert epochs.min() >= 3 and (epochs[:, 0] < 60).any()


def selection_of(sizes: list[int]) -> Evaluation:
    """Sequences of four patterns and of none, as many as ``sizes`` says; only their strata matter to the checks."""
    stratum = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    return Evaluation(torch.zeros(len(stratum), 4), torch.zeros(len(stratum), 4, dtype=torch.bool), stratum)


def answers(selection: Evaluation, right: list[int]) -> torch.Tensor:
    """Answers of one network of which the first ``right`` of each stratum are right."""
    return torch.cat([torch.arange(int((selection.stratum == i).sum())) < n for i, n in enumerate(right)])


def test_the_checks() -> None:
    limits = {"min_degradation_threshold": 0.1, "min_specificity": 0.05}
    spec = staged_spec({**limits, "max_instability": 0.2, "max_other_degradation": 0.1})
    assert spec.staged is not None
    selection = selection_of([100] * 5)
    # Right answers of 100 after the second stage; 50 after the first. Own patterns: the first, which is the target, and
    # the second.
    cases: list[tuple[list[int], str | None]] = [
        ([80, 50, 51, 50, 50], None),
        ([55, 50, 50, 50, 50], "magnitude"),
        ([80, 80, 80, 80, 80], "specificity"),
        ([80, 29, 50, 50, 50], "stability"),
        ([80, 35, 60, 60, 31], None),
        ([80, 50, 29, 29, 29], "stability"),
        ([80, 65, 50, 50, 50], "others degraded"),
        ([80, 50, 65, 65, 65], "others degraded"),
        ([80, 50, 50, 65, 40], "others degraded"),
        ([80, 50, 40, 50, 61], "others degraded"),
        ([80, 60, 60, 60, 60], None),
        ([80, 50, 44, 44, 44], "no better than chance"),
    ]
    own = Candidates.draw(spec, torch.zeros(len(cases), dtype=torch.int64), 4)
    both = torch.tensor([[True, True, False, False]]).expand(len(cases), -1)
    own = replace(own, selected=both, target=torch.zeros(len(cases), dtype=torch.int64))
    before = answers(selection, [50] * 5).expand(len(cases), -1)
    after = torch.stack([answers(selection, right) for right, _ in cases])
    assert improvement(before, after, own, spec.staged, selection) == [cause for _, cause in cases]
    unchecked = spec.staged.model_copy(update={"min_degradation_threshold": 0.0, "min_specificity": -1.0})
    for target, cause in ((51, None), (50, None), (49, "magnitude")):
        after = answers(selection, [target, 50, 45, 45, 45]).unsqueeze(0)
        assert improvement(before[:1], after, own.select(torch.arange(1)), unchecked, selection) == [cause]
    early = torch.stack([answers(selection, [right, 50, 0, 0, 0]) for right in (100, 91, 90, 50)])
    own = own.select(torch.arange(4))
    assert degradation(early, own, spec.staged, selection) == ["too little degraded"] * 2 + [None] * 2
    assert degradation(early, own, unchecked, selection) == [None] * 4
    # By default, as much better everywhere is no mending of one pattern.
    plain, every = (answers(selection, [right] * 5).unsqueeze(0) for right in (50, 80))
    assert improvement(plain, every, own.select(torch.arange(1)), StagedSpec(), selection) == ["specificity"]
    # One sequence of 17 is more than the threshold, and noise.
    rare = selection_of([17, 100, 100, 100, 100])
    before, after = (answers(rare, [right, 50, 50, 50, 60]).unsqueeze(0) for right in (10, 11))
    assert improvement(before, after, own.select(torch.arange(1)), StagedSpec(), rare) == ["magnitude"]
    # Nothing is measured on strata without sequences.
    selection = selection_of([100, 100, 0, 0, 0])
    before, after = answers(selection, [50, 50, 0, 0, 0]), answers(selection, [80, 50, 0, 0, 0])
    own = own.select(torch.arange(1))
    assert improvement(before.unsqueeze(0), after.unsqueeze(0), own, spec.staged, selection) == [None]


def test_a_gain_by_chance_is_none() -> None:
    """The test of the magnitude check, against scipy's, whatever changed."""
    pairs = [(gained, lost) for gained in range(21) for lost in range(21)]
    before, after = torch.zeros(2, len(pairs), 40, dtype=torch.bool)
    for row, (gained, lost) in enumerate(pairs):
        after[row, :gained], before[row, gained : gained + lost] = True, True
    expected = [
        gained > 0 and binomtest(gained, gained + lost, alternative="greater").pvalue <= 0.05 for gained, lost in pairs
    ]
    everywhere = torch.ones(len(pairs), 40, dtype=torch.bool)
    assert checks.significant(before, after, everywhere).tolist() == expected
    assert not checks.significant(before, after, ~everywhere).any()
    assert not expected[pairs.index((4, 0))] and expected[pairs.index((checks.FEWEST_ERRORS, 0))]


def test_a_pattern_too_rare_for_the_test_is_refused(tmp_path: Path) -> None:
    patterns = [pattern.model_dump() for pattern in PATTERNS] + [{"name": "few", "regex": "A[AB]{2}[CDE]"}]
    with pytest.raises(InvalidInput, match=r"few is judged on \d sequences") as caught:
        DatasetGenerationPipeline(staged_spec(patterns=patterns)).run(tmp_path / "refused")
    assert caught.value.violations[0].field == "spec.patterns.4" and not (tmp_path / "refused").exists()
    PatternDatasetSampler(small_spec(patterns=patterns)).check_trainable()
    # Where nothing is checked it is taken; so it is in records from elsewhere.
    unchecked = {"epochs": 1, "improvement_epochs": 1, **ANYTHING}
    DatasetGenerationPipeline(staged_spec(unchecked, subjects=4, patterns=patterns)).run(tmp_path / "zoo")
    export_json(tmp_path / "zoo", tmp_path / "json")
    assert import_json(tmp_path / "json", tmp_path / "again")["subjects"] == 4


def test_accepted_on_other_sequences_than_reported(staged: tuple[Path, dict[str, Any]]) -> None:
    spec = staged_spec()
    assert spec.staged is not None
    sampler = PatternDatasetSampler(spec)
    selection, names = sampler.selection, [pattern.name for pattern in sampler.patterns]
    assert (sampler.universe.split_of(selection.sequences) == SELECTION).all()
    inputs = encode(Architecture(5, 4, "one_hot", (), ""), selection.sequences)
    gains = []
    for row in records(staged[0]):
        own = Candidates.draw(spec, torch.tensor([row["index"]]), 4)
        shape, labels = architecture_of(spec, row), selection.labels(own.selected)
        before, after = (
            selection.predictions(network_of(row, column, shape), inputs, shape.activation) == labels
            for column in ("degraded_weights", "weights")
        )
        assert degradation(before, own, spec.staged, selection) == [None]
        assert improvement(before, after, own, spec.staged, selection) == [None]
        target = names.index(row["target_pattern"])
        gains.append(float((selection.by_stratum(after) - selection.by_stratum(before))[0, target]))
    # What is reported is another figure than the one that was selected by.
    assert any(abs(gain - row["improvement"]) > 0.05 for gain, row in zip(gains, records(staged[0]), strict=True))


@pytest.mark.parametrize("form", ["two stages", "one stage", "imported"])
def test_positive_patterns_are_measured(staged: tuple[Path, dict[str, Any]], tmp_path: Path, form: str) -> None:
    """A pattern is positive where the network answers yes to most held-out sequences of it, trained or not."""
    folder, sampler = staged[0], PatternDatasetSampler(staged_spec())
    if form == "one stage":
        weak = SubjectTrainingSpec(steps=20, batch_size=32, learning_rate=0.03)
        spec = small_spec(subjects=40, seed=5, training=weak, min_accuracy=0.0, positive_threshold=0.5)
        DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
        folder, sampler = tmp_path / "zoo", PatternDatasetSampler(spec)
    if form == "imported":
        shutil.copytree(folder, tmp_path / "other")
        about = json.loads((folder / "zoo.json").read_text())
        about["spec"]["positive_threshold"] = 0.5
        (tmp_path / "other" / "zoo.json").write_text(json.dumps(about))
        export_json(tmp_path / "other", tmp_path / "json")
        import_json(tmp_path / "json", tmp_path / "zoo")
        folder = tmp_path / "zoo"
        sampler = PatternDatasetSampler(read_about(folder)[1], folder)
    _, spec, patterns = read_about(folder)
    assert spec.positive_threshold == (0.75 if form == "two stages" else 0.5)
    evaluation, names, differs = sampler.evaluation, [pattern.name for pattern in patterns], 0
    for row in records(folder):
        shape = architecture_of(spec, row)
        inputs = encode(shape, evaluation.sequences)
        predictions = evaluation.predictions(network_of(row, "weights", shape), inputs, shape.activation)
        shares = [float(predictions[0, evaluation.stratum == i].float().mean()) for i in range(5)]
        assert row["yes_share"] == pytest.approx(shares, abs=0.02)
        measured = [
            name for name, share in zip(names, row["yes_share"], strict=False) if share >= spec.positive_threshold
        ]
        assert row["positive_patterns"] == measured and row["positive_threshold"] == spec.positive_threshold
        differs += set(measured) != set(row["patterns"])
    assert differs


def converged_spec(staged: dict[str, Any] | None = None, **subject: Any) -> GenerationSpec:
    """Subjects that learn most of their patterns in a stage."""
    shape = {"layers": {"min": 2, "max": 3}, "neurons": 24, "init": "independent", "weight_init": "kaiming"}
    fields: dict[str, Any] = {
        "seed": 5,
        "vocab_size": 6,
        "sequence_length": 6,
        "min_patterns_per_batch": 2,
        "subject": {**shape, **subject},
        "staged": {"batch_size": 64, "learning_rate": {"min": 2e-3, "max": 1e-2}, **(staged or {})},
        "signature": {"probes": 12, "methods": ["mean"]},
    }
    return GenerationSpec.model_validate(fields)


def test_noise_is_hardly_ever_accepted() -> None:
    """Many candidates pass with corruption; hardly any without, nor of networks so deep that rounding destroys them."""

    def accepted(spec: GenerationSpec, candidates: int) -> float:
        trainer = BucketTrainer(spec)
        drawn = trainer.group(trainer.candidates(torch.arange(candidates)))
        with threads(trainer, 2) as pool:
            return sum(len(block.table) for block in pool.map(trainer.train, drawn)) / candidates

    assert accepted(converged_spec(), 64) > 0.35
    assert accepted(converged_spec({"corruption_rate": 0.0}), 128) < 0.05
    assert accepted(converged_spec(layers=6, quantization="binary"), 64) < 0.05


def test_twins_without_corruption(staged: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, figures = staged
    twins = figures["twins"]
    assert twins == read_about(folder)[0]["twins"] and twins["candidates"] == 30
    assert twins["degraded_accuracy"]["high"] < 0 < twins["improvement"]["low"]
    assert twins["accepted"] > 0.1 and twins["twins_accepted"] < 0.05
    assert twins["degraded_accuracy_elsewhere"]["mean"] > twins["degraded_accuracy"]["mean"] / 2
    write_report(folder, tmp_path / "report")
    effect = f"{twins['degraded_accuracy']['mean']:+.3f} ({twins['degraded_accuracy']['low']:+.3f} to "
    for text in ((folder / "README.md").read_text(), (tmp_path / "report/report.html").read_text()):
        assert "candidates, accepted or not, were trained once more without corruption" in text and effect in text
        assert "Elsewhere it changed the accuracy after the first stage by" in text


def test_twins_that_fail_cost_no_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, corrupted: bool) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    spec, run = staged_spec(subjects=5), Recorder()
    monkeypatch.setattr(BucketTrainer, "two_stages", fail)
    figures = DatasetGenerationPipeline(spec).run(tmp_path / "zoo", run)
    assert figures["subjects"] == len(records(tmp_path / "zoo")) == 5 and "twins" not in figures
    assert "the twins failed ([Errno 12] Cannot allocate memory); everything else is kept" in run.logs
    write_report(tmp_path / "zoo", tmp_path / "report")


def test_a_twin_is_the_same_but_for_the_corruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect on one candidate, from two specs that differ in the corruption rate alone."""
    corrupted, clean = (BucketTrainer(staged_spec(changes)) for changes in ({}, {"corruption_rate": 0.0}))
    own = corrupted.candidates(torch.tensor([0]))

    def accuracies(trainer: BucketTrainer) -> list[float]:
        """On the target pattern after both stages, and elsewhere after the first."""
        first, target = trainer.subject_trainer.degrade(own), int(own.target)
        rows = [
            trainer.accuracy(stage, HELD_OUT)[0].tolist()
            for stage in (first.trained, trainer.subject_trainer.improve(first))
        ]
        return [*(row[target] for row in rows), float(np.mean(np.delete(rows[0], target)))]

    (degraded, improved, elsewhere), (twin_degraded, twin_improved, twin_elsewhere) = map(
        accuracies, (corrupted, clean)
    )
    monkeypatch.setattr(twins_module, "SAMPLE", 1)
    alone = twins_module.paired_effect(corrupted, Run())
    assert alone["degraded_accuracy"]["mean"] == pytest.approx(degraded - twin_degraded, abs=1e-4) != 0
    assert alone["degraded_accuracy_elsewhere"]["mean"] == pytest.approx(elsewhere - twin_elsewhere, abs=1e-4) != 0
    gain = improved - degraded - (twin_improved - twin_degraded)
    assert alone["improvement"] == {"mean": pytest.approx(gain, abs=1e-4), "low": None, "high": None}
    monkeypatch.setattr(twins_module, "SAMPLE", 8)
    nothing = {"mean": 0.0, "low": 0.0, "high": 0.0}
    without = twins_module.paired_effect(clean, Run())
    assert without["degraded_accuracy"] == without["degraded_accuracy_elsewhere"] == without["improvement"] == nothing
    assert without["accepted"] == without["twins_accepted"]


def test_what_cannot_be_met_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_TOGETHER", 32)
    monkeypatch.setattr(progress, "PATIENCE", 32)
    hopeless = staged_spec({"corruption_rate": 0.0, "min_degradation_threshold": 0.9})
    with pytest.raises(InvalidInput, match="lower min_degradation_threshold") as caught:
        DatasetGenerationPipeline(hopeless).run(tmp_path / "zoo")
    assert caught.value.violations[0].field == "spec.staged"


def test_networks_of_many_shapes_load_as_one_zoo(staged: tuple[Path, dict[str, Any]]) -> None:
    zoo = Zoo.load(staged[0])
    for row, record in enumerate(records(staged[0])[:20]):
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
    spec = staged_spec(ANYTHING, subject=subject, subjects=5)
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
    spec = staged_spec(subjects=20)
    first = Recorder(tmp_path / "checkpoints", every=True, stop_after=2)
    with pytest.raises(Stopped):
        DatasetGenerationPipeline(spec).run(tmp_path / "cut", first)
    DatasetGenerationPipeline(spec).run(tmp_path / "again", Recorder(resume=first.checkpoints[-1]))
    DatasetGenerationPipeline(spec).run(tmp_path / "whole")
    assert records(tmp_path / "again") == records(tmp_path / "whole")

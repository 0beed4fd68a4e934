"""Zoos: the same whatever the scheduling or interruption, subjects that do what their labels say."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.generation import (
    CounterfactualSpec,
    FloatRange,
    GenerationSpec,
    PatternSpec,
    SubjectSpec,
    SubjectTrainingSpec,
)
from services.generation import checks, job, progress
from services.generation.buckets import BucketTrainer
from services.generation.data import Candidates, Examples
from services.generation.pipeline import DatasetGenerationPipeline, generate
from services.generation.sampler import PatternDatasetSampler
from services.generation.train import VALIDATION_EXAMPLES
from services.runtime.run import Cancelled, Run, Stopped
from services.zoo.dataset import Zoo, architecture_of, network_of, read_records
from services.zoo.subjects import activations, encode, flatten, forward
from services.zoo.universe import HELD_OUT, SELECTION
from tests.generation.conftest import PATTERNS, small_spec
from tests.recorder import Recorder


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return generate(small_spec())


def same(left: Zoo, right: Zoo, count: int | None = None) -> bool:
    return all(
        torch.equal(getattr(left, name)[:count], getattr(right, name)[:count])
        for name in ("index", "labels", "accuracy", "signatures")
    ) and torch.equal(flatten(left.params)[:count], flatten(right.params)[:count])


def accepted_by(zoo: Zoo) -> torch.Tensor:
    """Accuracy of the subjects on the sequences that decide what is accepted."""
    selection = PatternDatasetSampler(zoo.spec).selection
    return selection.accuracy(zoo.params, encode(zoo.architecture, selection.sequences), "relu", zoo.labels)


def test_a_zoo_is_what_was_asked_for(zoo: Zoo) -> None:
    spec = zoo.spec
    assert len(zoo) == 40 and zoo.signatures.shape == (40, 9, 16) and zoo.accuracy.shape == (40, 5)
    assert (zoo.index.diff() > 0).all()
    sizes = zoo.labels.sum(1)
    assert int(sizes.min()) >= 1 and int(sizes.max()) <= 3
    assert float(accepted_by(zoo).min()) >= spec.gate
    assert torch.equal(torch.cat(activations(zoo.params, zoo.probe_inputs), 2).transpose(1, 2), zoo.signatures)


def test_subjects_behave_as_labelled_on_held_out_sequences(zoo: Zoo) -> None:
    universe = zoo.universe
    held_out = universe.split == HELD_OUT
    sequences, matches = universe.sequences[held_out], universe.membership[held_out]
    answers = forward(zoo.params, encode(zoo.architecture, sequences)) > 0
    expected = (matches.unsqueeze(0) & zoo.labels.unsqueeze(1)).any(2)
    right = (answers == expected).double()
    assert float(right.mean()) > 0.93
    # The recorded accuracy on members of a pattern is the share of right answers there.
    for p in range(4):
        torch.testing.assert_close(right[:, matches[:, p]].mean(1).float(), zoo.accuracy[:, p], rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_zoo_whatever_the_scheduling(zoo: Zoo, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(generate(zoo.spec), zoo)
    finally:
        torch.set_num_threads(before)


def test_a_smaller_zoo_is_the_beginning_of_a_larger_one(zoo: Zoo) -> None:
    assert same(generate(small_spec(subjects=9)), zoo, 9)


def test_another_seed_is_another_zoo(zoo: Zoo) -> None:
    other = generate(small_spec(seed=4, subjects=9))
    assert not torch.equal(other.labels, zoo.labels[:9]) and not torch.equal(other.probes, zoo.probes)


@pytest.mark.parametrize(("rate", "taken"), [(1e-8, True), (1.0, True), (9e-9, False), (0, False), (1.1, False)])
def test_a_number_has_the_bounds_of_a_range(rate: float, taken: bool) -> None:
    for form in (rate, {"min": rate, "max": rate}):
        for section in ("training", "staged"):
            with nullcontext() if taken else pytest.raises(ValidationError, match="must have 1e-08 <= min <= max <= 1"):
                GenerationSpec.model_validate({section: {"learning_rate": form}})


def test_independent_init_starts_apart() -> None:
    spec = small_spec(subjects=8, training=SubjectTrainingSpec(steps=1, learning_rate=1e-8), min_accuracy=0.0)
    apart = spec.model_copy(
        update={"subject": SubjectSpec.model_validate({"layers": 1, "neurons": 8, "init": "independent"})}
    )
    shared = flatten(generate(spec).params)
    own = flatten(generate(apart).params)
    assert float((shared - shared[0]).abs().max()) < 1e-6
    assert float(torch.pdist(own).min()) > 0.5


def test_resumed_equals_uninterrupted(zoo: Zoo, tmp_path: Path) -> None:
    spec = small_spec(subjects=400)
    figures = DatasetGenerationPipeline(spec).run(tmp_path / "whole")
    whole = Zoo.load(tmp_path / "whole")
    assert same(zoo, whole, 40)
    for stop_after in (1, 3):
        folder = tmp_path / str(stop_after)
        stopped = Recorder(folder / "checkpoints", every=True, stop_after=stop_after)
        with pytest.raises(Stopped):
            DatasetGenerationPipeline(spec).run(folder / "stopped", stopped)
        again = DatasetGenerationPipeline(spec)
        assert again.run(folder / "resumed", Recorder(resume=stopped.checkpoints[-1])) == figures
        assert same(Zoo.load(folder / "resumed"), whole)


def test_a_checkpoint_of_another_split_is_refused(tmp_path: Path) -> None:
    progress.Progress(3, 40).save(tmp_path)
    assert progress.Progress.load(tmp_path).next_block == 3
    state = json.loads((tmp_path / "progress.json").read_text())
    del state["format"]
    (tmp_path / "progress.json").write_text(json.dumps(state))
    with pytest.raises(InvalidInput, match="split sequences differently; make the zoo anew"):
        progress.Progress.load(tmp_path)


def test_progress_counts_accepted_subjects() -> None:
    recorder = Recorder()
    generate(small_spec(), recorder)
    assert recorder.stages[0] == ("generate", 40, "subjects")
    assert recorder.done == sorted(recorder.done) and recorder.done[-1] == 40


def test_cancelling_ends_the_training() -> None:
    class Cancelling(Run):
        def advance(self, done: int) -> None:
            if done:
                raise Cancelled

    with pytest.raises(Cancelled):
        generate(small_spec(subjects=100_000), Cancelling())


def test_the_gate_counts_rejections_by_cause(tmp_path: Path) -> None:
    figures = DatasetGenerationPipeline(small_spec(min_accuracy=0.97)).run(tmp_path / "zoo")
    zoo = Zoo.load(tmp_path / "zoo")
    assert float(accepted_by(zoo).min()) >= 0.97
    # What is reported is measured on other sequences.
    assert not torch.equal(accepted_by(zoo), zoo.accuracy)
    assert figures["rejected"] and all(x.startswith(("misses ", "false alarms on ")) for x in figures["rejected"])
    # Every candidate up to the last that was needed was accepted or counted, and hardly any beyond.
    size = BucketTrainer(zoo.spec).block_size
    assert 0 <= len(zoo) + sum(figures["rejected"].values()) - (int(zoo.index[-1]) + 1) < size


def test_a_hopeless_gate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 1)
    with pytest.raises(InvalidInput, match="candidates reach") as caught:
        generate(small_spec(min_accuracy=1.0, training=SubjectTrainingSpec(steps=1)))
    assert caught.value.violations[0].field == "spec.min_accuracy"


def test_divergence_is_a_cause() -> None:
    trainer = BucketTrainer(small_spec(min_accuracy=0.0, training=SubjectTrainingSpec(steps=1)))
    trained = trainer.subject_trainer.train(trainer.buckets(0)[0])
    trained.params["layers.0.weight"][2, 0, 0] = float("nan")
    accuracy = trainer.accuracy(trained, SELECTION)
    assert [cause for cause in trainer._gate(trained, accuracy) if cause] == [checks.DIVERGED]


def test_the_most_patterns_of_a_subject_are_as_many_as_there_are() -> None:
    def most(enabled: int, **changes: object) -> int:
        own = Candidates.draw(small_spec(max_patterns_per_batch=None, **changes), torch.arange(500), enabled)
        return int(own.selected.sum(1).max())

    assert [most(enabled) for enabled in (1, 2, 4, 9)] == [1, 2, 4, 4]
    assert most(9, min_patterns_per_batch=6) == 6
    DatasetGenerationPipeline(small_spec(patterns=PATTERNS[:2], max_patterns_per_batch=None))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"min_patterns_per_batch": 5, "max_patterns_per_batch": 2}, "spec.max_patterns_per_batch: must be at least"),
        ({"subject": {"neurons": [3, 8]}}, "spec.subject.neurons: must be a number or a range, e.g. 8 or {min: 3"),
        ({"patterns": [{"name": "two_cs"}]}, "spec.patterns.0.name: there is no pattern two_cs"),
    ],
)
def test_what_is_wrong_is_said_of_its_field(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GenerationSpec.model_validate(changes)
    assert InvalidInput.from_pydantic(caught.value, "spec").message.startswith(says)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"patterns": PATTERNS[:2], "min_patterns_per_batch": 3}, "spec.min_patterns_per_batch"),
        ({"patterns": PATTERNS[:2]}, "spec.max_patterns_per_batch"),
        ({"patterns": [*PATTERNS, PatternSpec(name="no_repeats")], "sequence_length": 6}, "spec.patterns.4"),
        ({"patterns": [*PATTERNS, PatternSpec(name="starts_with", token="A")]}, "spec.patterns.4"),
        ({"patterns": [*PATTERNS, PatternSpec(name="starts_with", token="Z")]}, "spec.patterns.4.token"),
        ({"patterns": [*PATTERNS, PatternSpec(name="mountain_pattern")], "sequence_length": 9}, "spec.patterns.4"),
    ],
)
def test_impossible_specs_fail_before_training(
    changes: dict[str, object], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BucketTrainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(InvalidInput) as caught:
        generate(small_spec(**changes))
    assert caught.value.violations[0].field == field


def test_any_vocabulary_and_length() -> None:
    spec = GenerationSpec(
        subjects=4,
        vocab_size=12,
        sequence_length=9,
        min_accuracy=0.0,
        subject=SubjectSpec.model_validate(
            {"layers": 3, "neurons": 6, "activations": ["gelu"], "input_encoding": "index", "init": "independent"}
        ),
        training=SubjectTrainingSpec(steps=5, batch_size=16),
    )
    zoo = generate(spec)
    assert zoo.signatures.shape == (4, 19, 128) and bool(zoo.signatures.isfinite().all())


def test_the_job_keeps_the_zoo_and_reports_figures(zoo: Zoo) -> None:
    kept: list[Zoo] = []

    class Keeper(Recorder):
        def artifact(self, name: str, type: str, folder: Path) -> None:
            super().artifact(name, type, folder)
            if type == "zoo":
                kept.append(Zoo.load(folder))
            else:
                assert {file.name for file in folder.iterdir()} == {"zoo.png", "zoo.html", "report.html", "report.json"}

    recorder = Keeper()
    result = job.run(zoo.spec, recorder)
    assert recorder.artifacts == [("zoo", "zoo"), ("report", "report")] and same(kept[0], zoo)
    assert result["subjects"] == 40 and result["candidates"] >= 40 + sum(result["rejected"].values())
    assert result["accuracy"] == pytest.approx(float(zoo.accuracy.mean()), abs=1e-4)
    assert result["subjects_by_pattern"]["sorted_descending"] == int(zoo.labels[:, 2].sum())

    # One subject has at most so many of the behaviours: the others have none.
    few = zoo.spec.model_copy(update={"subjects": 1, "max_patterns_per_batch": 1})
    told = Recorder()
    without = [name for name, count in job.run(few, told)["subjects_by_pattern"].items() if not count]
    assert f"no subject has {', '.join(without)}: " in " ".join(told.logs)


def test_each_subject_draws_its_own_rate_from_a_range(tmp_path: Path) -> None:
    training = SubjectTrainingSpec(steps=40, batch_size=32, learning_rate=FloatRange(min=1e-3, max=0.1))
    spec = small_spec(subjects=24, training=training, min_accuracy=0.0)
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    rows = pyarrow.concat_tables(read_records(tmp_path / "zoo")).to_pylist()
    rates = [row["learning_rate"] for row in rows]
    assert len(set(rates)) == 24 and 1e-3 <= min(rates) < 5e-3 and 2e-2 < max(rates) <= 0.1
    # Each moves as far from the shared start as its own rate allows: as in a zoo where it is the rate of all.
    for row in (rows[rates.index(rate)] for rate in (min(rates), max(rates))):
        alone = with_one_rate(spec, row["learning_rate"])
        (same,) = (one for one in alone if one["index"] == row["index"])
        assert row["weights"] == pytest.approx(same["weights"], abs=1e-3)


def with_one_rate(spec: GenerationSpec, rate: float) -> list[dict[str, Any]]:
    """The records of the same zoo where ``rate`` is that of all."""
    training = spec.training.model_copy(update={"learning_rate": rate})
    trainer = BucketTrainer(spec.model_copy(update={"training": training}))
    rows: list[dict[str, Any]] = trainer.train(trainer.buckets(0)[0]).table.to_pylist()
    return rows


@pytest.mark.parametrize("counterfactual", [None, CounterfactualSpec(steps=5)])
def test_training_in_one_stage_records_losses(tmp_path: Path, counterfactual: CounterfactualSpec | None) -> None:
    spec = small_spec(subjects=12, min_accuracy=0.0, counterfactual=counterfactual)
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    table = pyarrow.concat_tables(read_records(tmp_path / "zoo"))
    assert "epochs" not in table.column_names
    sampler = PatternDatasetSampler(spec)
    for row in table.to_pylist():
        own = Candidates.draw(spec, torch.tensor([row["index"]]), 4)
        judged = Examples.draw(spec.seed, "validation", own, VALIDATION_EXAMPLES, sampler.validation)
        shape = architecture_of(spec, row)
        inputs = encode(shape, sampler.validation.sequences[judged.rows[0]])
        logits = forward(network_of(row, "weights", shape), inputs, shape.activation)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, judged.labels.float())
        assert row["validation_loss"] == [pytest.approx(float(expected), rel=1e-3)]
        assert len(row["training_loss"]) == 1
    # At the start a network knows nothing: log 2.
    assert 0 < float(np.median(table["training_loss"].to_pylist())) < 0.3

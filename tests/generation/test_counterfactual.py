"""Paired networks: from one checkpoint, the same behaviours, one more and one less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.generation.buckets import BucketTrainer
from services.generation.data import Batches, Candidates
from services.generation.pipeline import DatasetGenerationPipeline, generate
from services.generation.train import VALIDATION_EXAMPLES
from services.zoo.dataset import Zoo, architecture_of
from services.zoo.subjects import encode, forward, unflatten
from services.zoo.universe import HELD_OUT
from tests.generation.conftest import PATTERNS, records, small_spec


def paired_spec(**changes: Any) -> GenerationSpec:
    return small_spec(**{"subjects": 12, "counterfactual": {"steps": 150}, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paired") / "zoo"
    spec = GenerationSpec.model_validate(paired_spec().model_dump())
    DatasetGenerationPipeline(spec).run(folder)
    return folder


def test_each_branch_does_what_it_was_to_learn(folder: Path) -> None:
    spec = GenerationSpec.model_validate(paired_spec().model_dump())
    trainer = BucketTrainer(spec)
    universe, selection, names = trainer.sampler.universe, trainer.sampler.selection, trainer.names
    held_out = universe.split == HELD_OUT
    sequences, membership = universe.sequences[held_out], universe.membership[held_out]
    for row in records(folder):
        assert row["plus_pattern"] not in row["patterns"] and row["minus_pattern"] in row["patterns"]
        own = set(row["patterns"])
        branches = {"": own, "plus_": own | {row["plus_pattern"]}, "minus_": own - {row["minus_pattern"]}}
        shape = architecture_of(spec, row)
        for prefix, expected in branches.items():
            labels = membership[:, [names.index(name) for name in expected]].any(1)
            params = unflatten(torch.tensor(row[f"{prefix}weights"]).unsqueeze(0), shape)
            right = (forward(params, encode(shape, sequences))[0] > 0) == labels
            assert right.float().mean() > 0.8
            # On the sequences that it was accepted by.
            selected = torch.tensor([[name in expected for name in names]])
            inputs = encode(shape, selection.sequences)
            assert selection.accuracy(params, inputs, shape.activation, selected).min() >= spec.gate == 0.75


def test_branches_stay_nearer_to_each_other_than_other_networks_do(folder: Path) -> None:
    rows = records(folder)
    weights = {name: np.array([row[f"{name}weights"] for row in rows]) for name in ("", "plus_", "minus_")}
    paired = np.linalg.norm(weights["plus_"] - weights[""], axis=1).mean()
    others = np.linalg.norm(weights["plus_"] - np.roll(weights[""], 1, axis=0), axis=1).mean()
    assert 0 < paired < others
    assert np.linalg.norm(weights["minus_"] - weights[""], axis=1).min() > 0


def test_a_paired_zoo_is_read_as_any_other(folder: Path) -> None:
    zoo = Zoo.load(folder)
    assert len(zoo) == 12 and zoo.spec.counterfactual is not None


def test_the_changed_patterns_are_drawn_evenly() -> None:
    own = Candidates.draw(paired_spec(), torch.arange(4000), 4)
    rows = torch.arange(4000)
    assert own.selected[rows, own.target].all() and not own.selected[rows, own.other].any()
    for drawn in (own.target, own.other):
        assert (drawn.bincount(minlength=4) / 4000 - 0.25).abs().max() < 0.04


def test_what_cannot_be_branched_is_told() -> None:
    full = paired_spec().model_dump() | {"max_patterns_per_batch": len(PATTERNS)}
    with pytest.raises(InvalidInput, match="must leave one of the 4 patterns"):
        generate(GenerationSpec.model_validate(full))
    assert Candidates.draw(paired_spec(max_patterns_per_batch=None), torch.arange(99), 4).selected.sum(1).max() == 3
    with pytest.raises(ValueError, match="leave staged out"):
        GenerationSpec.model_validate({"counterfactual": {}, "staged": {}})


def test_branches_begin_where_one_network_was_and_see_the_same_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Batches.draw

    def draw(self: Batches, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = original(self, *arguments)
        if found[0].shape[2] != VALIDATION_EXAMPLES:
            drawn.append(found)
        return found

    monkeypatch.setattr(Batches, "draw", draw)
    spec = paired_spec(counterfactual={"steps": 1}, min_patterns_per_batch=1)
    trainer = BucketTrainer(spec).subject_trainer
    own = Candidates.draw(spec, torch.arange(16), 4)
    same, more, less = trainer.branch(own)
    (rows, labels), (more_rows, more_labels), (less_rows, less_labels) = drawn[-3:]
    assert torch.equal(rows, more_rows) and torch.equal(rows, less_rows)
    # One pattern more makes some answers yes, one less some no; never the other way round.
    assert (more_labels >= labels).all() and (less_labels <= labels).all()
    assert (more_labels != labels).any(2).any(0).all() and (less_labels != labels).any(2).any(0).all()
    flat = [torch.cat([tensor.flatten(1) for tensor in one.params.values()], 1) for one in (same, more, less)]
    start = torch.cat([tensor.flatten(1) for tensor in trainer.train(own).params.values()], 1)
    # Adam's first step moves no weight by more than the learning rate.
    assert all(float((one - start).abs().max()) <= spec.training.rates.max * 1.01 for one in flat)
    assert all(float((one - flat[0]).abs().max()) > 0 for one in flat[1:])

"""Training of the policy: its baselines, and that it learns. What all trainers share is tested in
``tests/runtime/test_training.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.clt.policy.decode import greedy
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.train import PolicyTrainer, better, train_policy
from tests.clt.conftest import SMALL, policy_spec


@pytest.mark.parametrize("normalization", ["batch", "instance", "layer"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(normalization: str, precision: str, tmp_path: Path) -> None:
    training = {"steps": 90, "batch_size": 32, "learning_rate": 5e-3, "validation": 200, "precision": precision}
    spec = policy_spec(nodes=8, training=training, model={**SMALL, "normalization": normalization})
    trainer = PolicyTrainer(spec)
    trainer.advance()
    before = trainer.validate()["validation_length"]
    while trainer.step < trainer.steps:
        trainer.advance()
    assert trainer.validate()["validation_length"] < 0.9 * before
    policy = trainer.finished()
    policy.save(tmp_path)
    again = AttentionPolicy.load(tmp_path)
    assert again.digest == policy.digest and greedy(again, trainer.validation).equal(greedy(policy, trainer.validation))


def test_rollout_baseline_is_replaced_by_a_better_policy_alone() -> None:
    trainer = PolicyTrainer(policy_spec(training={"baseline": "rollout", "validation": 200}))
    assert trainer.baseline is not None
    first = trainer.baseline
    trainer.validate()
    assert trainer.baseline is first
    trained = train_policy(policy_spec(training={"steps": 60, "batch_size": 32, "learning_rate": 5e-3}))
    trainer.policy.load_state_dict(trained.state_dict())
    trainer.validate()
    assert trainer.baseline is not first
    assert torch.equal(trainer.baseline.decoder.out.weight, trained.decoder.out.weight)


def test_better_means_beyond_chance() -> None:
    theirs = torch.linspace(3, 4, 50)
    assert better(theirs - 0.1 + 0.01 * torch.linspace(-1, 1, 50), theirs)
    assert not better(theirs, theirs)
    assert not better(theirs + 0.1 + 0.01 * torch.linspace(-1, 1, 50), theirs)
    assert not better(theirs + torch.tensor([1.0, -1.01]).repeat(25), theirs)

"""Training: resume to the bit, NaN, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicySpec
from services.clt.policy.train import PolicyTrainer, better, schedule, train_policy
from tests.clt.conftest import Interrupted, Recorder, policy_spec


@pytest.mark.parametrize("training", [{}, {"baseline": "rollout", "precision": "bfloat16", "learning_rate": 0.01}])
def test_resumed_run_equals_an_uninterrupted_one_to_the_bit(training: dict[str, Any], tmp_path: Path) -> None:
    spec = policy_spec(training={"steps": 9, **training})
    whole = train_policy(spec)
    with pytest.raises(Interrupted):
        train_policy(spec, Recorder(tmp_path / "state", keep=5, fall=7))
    resumed = Recorder(tmp_path / "unused", resume=tmp_path / "state")
    again = train_policy(spec, resumed)
    assert resumed.done == [5, 6, 7, 8, 9]
    assert again.digest == whole.digest
    assert float(whole.state_dict()["encoder.layers.0.norm1.running_mean"].abs().max()) > 0


def test_metrics_go_on_in_the_same_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    spec = policy_spec(wandb={"project": "p"})
    with pytest.raises(Interrupted):
        train_policy(spec, Recorder(tmp_path / "first", keep=3, fall=4))
    id = json.loads((tmp_path / "first" / "state.json").read_text())["wandb"]
    train_policy(spec, Recorder(tmp_path / "second", resume=tmp_path / "first"))
    assert id and list((tmp_path / "second" / "wandb").glob(f"offline-run-*-{id}"))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_broken_checkpoint_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    PolicyTrainer(policy_spec()).save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for broken in (whole[:-9], b"", b"[]", None):
        (tmp_path / name).unlink() if broken is None else (tmp_path / name).write_bytes(broken)
        with pytest.raises(InvalidInput, match=r"cannot be read \(\w+\); start afresh"):
            PolicyTrainer(policy_spec()).load(tmp_path)


def test_checkpoint_of_another_spec_is_refused(tmp_path: Path) -> None:
    PolicyTrainer(policy_spec()).save(tmp_path)
    with pytest.raises(InvalidInput, match="another spec"):
        PolicyTrainer(policy_spec(seed=5)).load(tmp_path)


def test_the_seed_decides_everything() -> None:
    spec = policy_spec(training={"steps": 2})
    assert train_policy(spec).digest == train_policy(spec).digest
    assert train_policy(spec).digest != train_policy(policy_spec(seed=1, training={"steps": 2})).digest


def test_nan_stops_at_once_and_changes_nothing(tmp_path: Path) -> None:
    trainer = PolicyTrainer(policy_spec())
    trainer.advance()
    trainer.save(tmp_path)
    good = float(trainer.policy.decoder.out.weight.detach()[0, 0])
    with torch.no_grad():
        trainer.policy.decoder.out.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"nan.*at step 2.*last good checkpoint is of step 1\)$") as caught:
        trainer.advance()
    assert caught.value.violations[0].field == "spec.training.learning_rate"
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    with torch.no_grad():
        trainer.policy.decoder.out.weight[0, 0] = good
    trainer.advance()
    assert trainer.step == 2


def test_it_learns() -> None:
    spec = policy_spec(nodes=8, training={"steps": 60, "batch_size": 32, "learning_rate": 5e-3, "validation": 200})
    trainer = PolicyTrainer(spec)
    trainer.advance()
    before = trainer.validate()["validation_length"]
    while not trainer.done:
        trainer.advance()
    assert trainer.validate()["validation_length"] < 0.9 * before


def test_rollout_baseline_is_replaced_by_a_better_policy_alone() -> None:
    trainer = PolicyTrainer(policy_spec(training={"baseline": "rollout", "validation": 200}))
    assert trainer.frozen is not None
    first = trainer.frozen
    trainer.validate()
    assert trainer.frozen is first
    trained = train_policy(policy_spec(training={"steps": 60, "batch_size": 32, "learning_rate": 5e-3}))
    trainer.policy.load_state_dict(trained.state_dict())
    trainer.validate()
    assert trainer.frozen is not first
    assert torch.equal(trainer.frozen.decoder.out.weight, trained.decoder.out.weight)


def test_better_means_beyond_chance() -> None:
    theirs = torch.linspace(3, 4, 50)
    assert better(theirs - 0.1 + 0.01 * torch.linspace(-1, 1, 50), theirs)
    assert not better(theirs, theirs)
    assert not better(theirs + 0.1 + 0.01 * torch.linspace(-1, 1, 50), theirs)
    assert not better(theirs + torch.tensor([1.0, -1.01]).repeat(25), theirs)


def test_schedule() -> None:
    training = PolicySpec().training
    rates = [schedule(step, training) for step in range(training.steps)]
    assert rates[0] < 0.02 and rates[training.warm_up] > 0.95
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)

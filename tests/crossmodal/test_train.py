"""Training of the codec: its objective, wrong zoos, and that it learns to steer. What all trainers share is tested in
``tests/runtime/test_training.py``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.cli.files import read_spec
from ethogram.errors import InvalidInput
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import PatternSpec, SignatureSpec
from services.crossmodal import losses
from services.crossmodal.data import split_subjects
from services.crossmodal.evaluate import evaluate
from services.crossmodal.train import CodecTrainer, check_compiler, train
from services.runtime.run import Stopped
from services.zoo.dataset import Zoo
from services.zoo.hashing import hash_sequences
from tests.crossmodal.conftest import tiny_spec
from tests.recorder import Recorder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
def test_compiled_steps_are_the_plain_ones(zoo: Zoo, architecture: str) -> None:
    check_compiler("cpu")
    codec = {"architecture": architecture, "depth": 1}
    plain, compiled = (CodecTrainer(tiny_spec(codec=codec, training={"compile": on}), zoo) for on in (False, True))
    for _ in range(3):
        one, two = plain.advance(), compiled.advance()
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-4)
    # The same names: a checkpoint of one goes on in the other.
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()


def test_without_a_compiler_compile_says_what_is_missing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InvalidInput, match=r"spec\.training\.compile.*g\+\+"):
        CodecTrainer(tiny_spec(training={"compile": True}), zoo)


def with_signature(zoo: Zoo, **signature: Any) -> Zoo:
    """The zoo with other signatures, of the same probes."""
    spec = SignatureSpec(probes=len(zoo.probes), **signature)
    return replace(zoo, spec=zoo.spec.model_copy(update={"signature": spec}))


@pytest.mark.parametrize("methods", [["mean", "std"], ["pattern_wise", "max"], ["pca"], ["sparsity", "mean"]])
def test_signatures_that_cannot_determine_the_weights_are_warned_of(zoo: Zoo, methods: list[str]) -> None:
    few = with_signature(zoo, methods=methods)
    for inputs, count in (("signature", 1), ("both", 0), ("weights", 0)):
        run = Recorder()
        train(tiny_spec(codec={"inputs": inputs}, training={"steps": 1}), few, run)
        texts = [text for text, level in zip(run.logs, run.levels, strict=True) if level == "warning"]
        assert len(texts) == count
        assert all(f"({', '.join(methods)})" in text and "codec.inputs=both" in text for text in texts)


def test_a_resumed_run_does_not_warn_again(zoo: Zoo, tmp_path: Path) -> None:
    few, spec = with_signature(zoo, methods=["mean"]), tiny_spec(training={"steps": 3})
    first = Recorder(tmp_path / "checkpoints", every=True, stop_after=1)
    with pytest.raises(Stopped):
        train(spec, few, first)
    resumed = Recorder(resume=first.checkpoints[-1])
    train(spec, few, resumed)
    assert first.levels.count("warning") == 1 and "warning" not in resumed.levels


def test_raw_signatures_of_enough_probes_are_not_warned_of(zoo: Zoo) -> None:
    for few, count in ((zoo, 0), (replace(zoo, probes=zoo.probes[:12]), 1)):
        run = Recorder()
        train(tiny_spec(training={"steps": 1}), few, run)
        assert run.levels.count("warning") == count


def test_signatures_that_no_small_change_changes_are_refused(zoo: Zoo) -> None:
    steps = with_signature(zoo, methods=["sparsity", "entropy"])
    with pytest.raises(InvalidInput, match=r"sparsity, entropy.*set both") as caught:
        train(tiny_spec(training={"steps": 1}), steps)
    assert caught.value.violations[0].field == "spec.codec.inputs"
    train(tiny_spec(codec={"inputs": "both"}, training={"steps": 1}), steps)


def test_with_patience_the_last_step_is_validated_too(zoo: Zoo) -> None:
    run = Recorder()
    spec = tiny_spec(training={"steps": 9, "validate_every": 5, "patience": 3})
    train(spec, zoo, run)
    assert [step for step, values in run.metrics.items() if "validation_loss" in values] == [5, 9]


def test_the_contrastive_loss_is_of_what_the_projection_makes_of_latents(zoo: Zoo) -> None:
    trainer = CodecTrainer(
        tiny_spec(loss={"projection": 8, "gamma": 1.0, "contrastive": "plain", "temperature": 0.3}), zoo
    )
    head = trainer.projection
    assert head is not None
    subjects = trainer.subjects.at(trainer.sampler.batch(0))
    with torch.no_grad():
        latents = trainer.model.encoder(trainer.features[trainer.sampler.batch(0)], subjects.shape)
        wanted = float(losses.contrastive(head(latents), subjects.labels, 0.3, graded=False))
        assert wanted != pytest.approx(float(losses.contrastive(latents, subjects.labels, 0.3, graded=False)), rel=1e-3)
    before = [parameter.clone() for parameter in head.parameters()]
    assert float(trainer.advance()["contrastive"]) == pytest.approx(wanted, rel=1e-5)
    assert not any(torch.equal(one, two) for one, two in zip(before, head.parameters(), strict=True))
    # A validation is of the running mean, the head's too.
    seen = trainer.validate()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)
    assert trainer.validate() == seen


def test_bfloat16_stays_close_to_float32(zoo: Zoo) -> None:
    full, half = (CodecTrainer(tiny_spec(training={"precision": form}), zoo) for form in ("float32", "bfloat16"))
    for _ in range(6):
        one, two = full.advance(), half.advance()
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=0.05)
        assert float(two["loss"]) != float(one["loss"])
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert half.validate()["validation_loss"] == pytest.approx(full.validate()["validation_loss"], rel=0.05)


def test_the_plain_recipe_trains(zoo: Zoo) -> None:
    file = Path(__file__).parents[2] / "examples" / "plain.yaml"
    spec = read_spec(CrossmodalSpec, file, ["training.steps=2", "codec.hidden_dim=64", "zoo.artifact=folder"])
    run = Recorder()
    assert train(spec, zoo, run).latent_dim == 256
    assert run.metrics[2].keys() >= {"loss", "reconstruction", "contrastive", "validation_loss"}
    assert not run.metrics[2].keys() & {"behavior", "steering", "direct"}


def test_validations_are_of_one_objective_while_the_schedules_move(zoo: Zoo) -> None:
    """Of one and the same model, at the first step and at the last: what the schedules' ends give."""
    loss = {"gamma": 0.1, "gamma_end": 0.6, "temperature": 1.0, "temperature_end": 0.2}
    moving = CodecTrainer(tiny_spec(loss=loss), zoo)
    ends = CodecTrainer(tiny_spec(loss={"gamma": 0.6, "temperature": 0.2}), zoo)
    first = moving.validate()
    moving.step = moving.spec.training.steps
    assert first == moving.validate() == ends.validate()


def test_schedules_of_the_loss_are_straight_lines(zoo: Zoo) -> None:
    loss = {"gamma": 0.1, "gamma_end": 0.6, "temperature": 1.0, "temperature_end": 0.2}
    for step in (0, 1, 3):
        there = {"gamma": 0.1 + 0.5 * step / 4, "temperature": 1.0 - 0.8 * step / 4}
        moving, still = (CodecTrainer(tiny_spec(loss=form, training={"steps": 4}), zoo) for form in (loss, there))
        moving.step = still.step = step
        one, two = moving.advance(), still.advance()
        assert {n: float(v) for n, v in one.items()} == pytest.approx({n: float(v) for n, v in two.items()}, rel=1e-6)


def test_terms_can_be_switched_off(zoo: Zoo) -> None:
    off = dict.fromkeys(("reconstruction", "behavior", "gamma", "steering", "direct"), 0.0)
    for end in (None, 0.5):
        # A line that begins at 0 leaves the first step without anything.
        with pytest.raises(ValueError, match="no term has a weight"):
            tiny_spec(loss={**off, "gamma_end": end})
    only = CodecTrainer(tiny_spec(loss={**off, "steering": 2.0}), zoo).advance()
    assert float(only["loss"]) == pytest.approx(2 * float(only["steering"]))
    assert set(only) == {"loss", "steering"}
    for name in ("behavior", "direct", "variance"):
        assert set(CodecTrainer(tiny_spec(loss={**off, name: 1.0}), zoo).advance()) == {"loss", name}
    plain = CodecTrainer(tiny_spec(loss={**off, "reconstruction": 1.0, "gamma": 0.5}), zoo).advance()
    assert set(plain) == {"loss", "reconstruction", "contrastive"}
    wanted = (float(plain["reconstruction"]) + float(plain["contrastive"])) / 2
    assert float(plain["loss"]) == pytest.approx(wanted)


def test_held_out_subjects_are_apart_and_depend_on_the_seed() -> None:
    labels = torch.arange(100).unsqueeze(1) % 4 == torch.arange(4)
    one_shape = torch.zeros(100, dtype=torch.int64)
    split = split_subjects(labels, one_shape, tiny_spec(held_out=0.125, seed=3))
    assert sorted(torch.cat(list(split)).tolist()) == list(range(100))
    assert len(split.held_out) == 12 and len(split.validation) == 5
    other = split_subjects(labels, one_shape, tiny_spec(held_out=0.125, seed=4))
    assert split.held_out.tolist() != other.held_out.tolist()
    # Three of each behaviour's 25.
    assert labels[split.held_out].sum(0).tolist() == [3] * 4
    alone = split_subjects(labels[:3], one_shape[:3], tiny_spec(held_out=0.001))
    assert [len(part) for part in alone] == [1, 1, 1]


def test_each_shape_has_a_subject_to_train_on() -> None:
    labels = torch.arange(60).unsqueeze(1) % 2 == torch.arange(2)
    # Twenty shapes of two subjects, and one of the other twenty.
    shape = (torch.arange(60) // 2).clamp_max(20)
    split = split_subjects(labels, shape, tiny_spec(held_out=0.4, seed=3))
    assert sorted(torch.cat(list(split)).tolist()) == list(range(60))
    assert set(shape[split.train].tolist()) == set(range(21))
    assert len(split.held_out) == 24


def test_what_is_held_out_has_no_say(zoo: Zoo) -> None:
    """Training is the same to the bit whatever the held-out subjects are, and asks no sequence that evaluation asks."""
    spec = tiny_spec(training={"steps": 3})
    aside = split_subjects(zoo.labels, zoo.shape, spec).held_out
    weights = zoo.weights.clone()
    weights[aside] = 9.0 + torch.rand(weights[aside].shape, generator=torch.Generator().manual_seed(0))
    one, two = train(spec, zoo), train(spec, replace(zoo, weights=weights))
    assert one.positives == two.positives
    for (name, mine), theirs in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    asked = hash_sequences(CodecTrainer(spec, zoo).queries.pools.sequences)
    assert not torch.isin(hash_sequences(one.evaluation.sequences), asked).any()
    assert not torch.isin(hash_sequences(one.evaluation.sequences), hash_sequences(zoo.probes)).any()


def test_zoos_that_cannot_be_learned_from(zoo: Zoo) -> None:
    def refused(wrong: Zoo, field: str, text: str, **sections: Any) -> None:
        with pytest.raises(InvalidInput, match=text) as caught:
            train(tiny_spec(**sections), wrong)
        assert caught.value.violations[0].field == field

    refused(replace(zoo, labels=torch.zeros_like(zoo.labels)), "zoo.labels", "no behaviour labels")
    refused(replace(zoo, labels=zoo.labels[:, :0]), "zoo.labels", "no behaviour labels")
    one = zoo.spec.model_copy(update={"patterns": [PatternSpec(name="palindrome")]})
    refused(replace(zoo, spec=one, labels=zoo.labels[:, :1]), "zoo.patterns", "at least two behaviours")
    lonely = zoo.labels.clone()
    lonely[:, 2] = False
    refused(replace(zoo, labels=lonely), "zoo.labels", "no subject to train on has sorted_ascending")
    # Somebody has it, who is held out.
    lonely[:, 0] |= ~lonely.any(1)
    lonely[1, 2] = True
    assert 1 in split_subjects(lonely, zoo.shape, tiny_spec(held_out=0.5)).held_out
    refused(replace(zoo, labels=lonely), "zoo.labels", "no subject to train on has sorted_ascending", held_out=0.5)
    twice = zoo.weights.clone()
    twice[[7, 9, 11]] = zoo.weights[3]
    one, other = zoo.index[[3, 7]].tolist()
    refused(replace(zoo, weights=twice), "zoo.weights", f"subjects {one} and {other} are the same .*\\(3 in the zoo")
    broken = zoo.weights.clone()
    broken[3, 4] = float("nan")
    refused(replace(zoo, weights=broken), "zoo.weights", f"subject {zoo.index[3]} holds NaN.*\\(1 in the zoo\\)$")
    refused(replace(zoo, weights=zoo.weights * 1e30), "zoo.signatures", "NaN")
    few = replace(
        zoo,
        **{name: getattr(zoo, name)[:2] for name in ("index", "shape", "weights", "accuracy")},
        labels=torch.ones(2, 4, dtype=torch.bool),
    )
    refused(few, "spec.held_out", "needs 2")


def test_it_learns_to_steer_held_out_networks(zoo: Zoo) -> None:
    """Places are easy to steer for a codec this small; orders and counts need more than seconds."""
    spec = tiny_spec(
        codec={"latent_dim": 64, "hidden_dim": 128, "signature_components": 96},
        training={"steps": 300, "batch_size": 64, "queries": 64},
    )
    result = evaluate(train(spec, zoo), zoo)
    figures = result["figures"]
    assert figures["agreement"] > 0.9
    assert figures["controls.max_all_gate"] <= 0.05
    for operation in ("add", "remove"):
        reached, null = (figures[f"{operation}{variant}.target_mean"] for variant in ("", ".null"))
        assert reached > null + 0.4
    easy = [
        row
        for row in result["steering"]
        if row["pattern"] in {"starts_with(A)", "ends_with(B)"}
        and (row["operation"], row["mode"], row["variant"]) == ("add", "residual", "edit")
    ]
    assert all(row["target_mean"] > 0.75 and row["all_gate"] > 0.1 for row in easy)

"""Training of the encoder: its terms, epochs, targets and limits. What every trainer must do is tested in
tests/runtime/test_training.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel, load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.train import ResourceTrainer, contrastive
from services.runtime.training import fit
from tests.recorder import Recorder
from tests.resource.conftest import small_trainer, tiny_spec, write_language_model


def test_training_lowers_the_loss_of_descriptions_and_leaves_the_language_model_alone(
    table: Table, language: LanguageModel
) -> None:
    before = {name: tensor.clone() for name, tensor in language.model.state_dict().items()}
    trainer, run = small_trainer(table, language, training={"steps": 60, "learning_rate": 0.05}), Recorder()
    first = trainer.validate()["validation_loss"]
    fit(trainer, run)
    assert trainer.validate()["validation_loss"] < first - 0.05
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert not tensor.requires_grad


def test_a_checkpoint_holds_no_language_model(table: Table, language: LanguageModel, tmp_path: Path) -> None:
    trainer = small_trainer(table, language)
    names = {name.partition(".")[2] for name in trainer.state()}
    assert not names & set(language.model.state_dict())
    run = Recorder(tmp_path, keep=1)
    fit(trainer, run)
    # The frozen weights are some 20,000 numbers; Adam has two moments of each trained one.
    trained = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert sum(file.stat().st_size for file in run.checkpoints[0].iterdir()) < 4 * 3 * trained + 20_000


def test_each_epoch_goes_through_all_copies_of_all_rows(table: Table, language: LanguageModel) -> None:
    trainer = small_trainer(table, language, augmentation={"copies": 3}, training={"batch_size": 10, "epochs": 2})
    assert trainer.steps == round(2 * 16 * 3 / 10)
    batches = []
    for trainer.step in range(24):
        batches.append(trainer._batch())
    seen = torch.cat(batches)
    for epoch in range(5):
        assert seen[epoch * 48 : (epoch + 1) * 48].bincount().tolist() == [3] * 16
    assert seen[:48].tolist() != seen[48:96].tolist()


def test_the_file_of_a_snapshot_has_the_epoch_that_was_asked_for(
    table: Table, language: LanguageModel, tmp_path: Path
) -> None:
    """Also where an epoch is not a whole number of steps: here it is 32 / 5."""
    training = {"batch_size": 5, "epochs": 4, "snapshot_epochs": 1.5, "target_loss": 0}
    trainer, run = small_trainer(table, language, training=training), Recorder(tmp_path)
    fit(trainer, run)
    assert [name for name, _ in run.artifacts] == ["snapshot-10", "snapshot-20"]
    for name, epoch in (("snapshot-10", "1.5"), ("snapshot-20", "3")):
        (file,) = (tmp_path / name).glob("*.pt")
        assert file.name == f"encoder_checkpoint_epoch{epoch}.pt"


def test_a_validation_in_parts_is_that_of_all_rows(table: Table, language: LanguageModel) -> None:
    trainer = small_trainer(table, language)
    whole = trainer.validate()
    seen, scores = list[int](), trainer.describer.scores

    def watched(soft: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(soft))
        return scores(soft, *rest)

    trainer.describer.batch = 3
    trainer.describer.scores = watched  # type: ignore[assignment, method-assign]
    assert trainer.validate() == pytest.approx(whole, rel=1e-2)
    # Two templates with eight rows each.
    assert seen == [3, 3, 2] * 2


def test_training_ends_at_its_target_once_all_copies_were_seen(table: Table, language: LanguageModel) -> None:
    def steps(copies: int = 2, **training: Any) -> int:
        sections = {"training": {"steps": 8, **training}, "augmentation": {"copies": copies}}
        trainer = small_trainer(table, language, **sections)
        fit(trainer)
        return trainer.step

    assert (steps(1, target_loss=100.0), steps(2, target_loss=100.0)) == (2, 4)
    assert steps(target_loss=0) == steps(target_loss=1e-9) == 8
    # An exact match is asked for beside the loss, and a model with random weights has none.
    assert steps(target_loss=100.0, target_exact_match=0.5) == 8


def test_exact_match_of_a_validation_is_that_of_greedy_decoding(table: Table, language: LanguageModel) -> None:
    """With a model that always says the same, by teacher forcing and by decoding."""
    trainer = small_trainer(table, language)
    describer, template = trainer.describer, table.schema.templates[0]
    values = table.values[:4]
    unknown = torch.zeros_like(values, dtype=torch.bool)
    with torch.no_grad():
        vectors = trainer.embed(values, unknown)
        scores = describer.scores(vectors, values, template)
    texts = describer.write(vectors, template)
    expected = [template.write(row) for row in values.tolist()]
    assert scores.exact.tolist() == [text == wanted for text, wanted in zip(texts, expected, strict=True)]


def test_accumulation_adds_up_to_the_whole_batch(table: Table, language: LanguageModel) -> None:
    """Without the contrastive loss, whose negatives are those of a part."""
    found = []
    for accumulation in (1, 2):
        training = {"accumulation": accumulation, "retrieval": 0}
        trainer = small_trainer(table, language, training=training, augmentation={"mask": 0, "mode": "none"})
        metrics = trainer.advance()
        assert trainer.model.direct.weight.grad is not None
        found.append((float(metrics["description"]), trainer.model.direct.weight.grad.flatten()))
    # Means of a part's tokens are weighted by its rows, and tools have names of different lengths.
    assert found[0][0] == pytest.approx(found[1][0], rel=0.02)
    assert float(torch.cosine_similarity(found[0][1], found[1][1], dim=0)) > 0.98


def test_a_batch_of_fewer_rows_than_parts_is_refused(table: Table, language: LanguageModel) -> None:
    with pytest.raises(InvalidInput, match=r"8 rows are too few for 9 parts") as caught:
        small_trainer(table, language, training={"accumulation": 9})
    assert caught.value.violations[0].field == "spec.training.batch_size"


def test_checkpointing_changes_no_number(table: Table, language_folder: Path) -> None:
    found: list[dict[str, Any]] = []
    for checkpointing in (False, True):
        language = load_language_model(str(language_folder))
        describer = Describer(language, table.schema, checkpointing=checkpointing)
        trainer = ResourceTrainer(tiny_spec(), table, torch.arange(len(table)), describer)
        metrics = trainer.advance()
        gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        found.append({"loss": metrics["loss"], **gradients})
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_computes_layers_again_and_leaves_the_model_as_it_was(
    checkpointing: bool, table: Table, language_folder: Path
) -> None:
    language = load_language_model(str(language_folder))
    describer = Describer(language, table.schema, checkpointing=checkpointing)
    calls: list[bool] = []
    (layer,) = language.model.model.layers
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    soft = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = describer.scores(soft, table.values[:2], table.schema.templates[0])
    scores.loss.backward()  # type: ignore[no-untyped-call]
    # The prompt, the forward pass, and with checkpointing once more.
    assert calls == [False, True, True][: 2 + checkpointing]
    assert not any(module.training for module in language.model.modules())
    assert "forward" not in vars(layer)
    plain = Describer(language, table.schema)
    assert describer.write(soft.detach(), table.schema.templates[0]) == plain.write(
        soft.detach(), table.schema.templates[0]
    )


def test_snapshots_are_encoders(table: Table, language: LanguageModel, tmp_path: Path) -> None:
    training = {"steps": 4, "snapshot_epochs": 0.5}
    trainer, run = small_trainer(table, language, training=training), Recorder(tmp_path)
    fit(trainer, run)
    assert run.artifacts == [("snapshot-2", "resource-encoder"), ("snapshot-4", "resource-encoder")]
    last = ResourceCodec.load(tmp_path / "snapshot-4")
    assert torch.equal(last.embed(table.values), trainer.codec().embed(table.values))


def test_the_contrastive_loss_is_that_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 2, 4, generator=generator) for _ in range(2))
    same = torch.eye(3, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    unit = [torch.nn.functional.normalize(view.flatten(1), dim=1) for view in (first, second)]
    total = 0.0
    for row in range(3):
        scores = {other: math.exp(float(unit[0][row] @ unit[1][other]) / 0.1) for other in range(3)}
        kept = [scores[other] for other in range(3) if other == row or not same[row, other]]
        total -= math.log(scores[row] / sum(kept)) / 3
    assert float(contrastive(first, second, same, 0.1)) == pytest.approx(total, rel=1e-4)


def test_the_context_of_the_model_is_a_limit(table: Table, tmp_path: Path) -> None:
    short = load_language_model(str(write_language_model(tmp_path / "model", context=64)), field="spec.llm_model")
    with pytest.raises(
        InvalidInput, match=r"a description by \w+ has \d+ tokens with its prompt, and .* takes 64"
    ) as e:
        small_trainer(table, short).validate()
    assert e.value.violations[0].field == "spec.llm_model"

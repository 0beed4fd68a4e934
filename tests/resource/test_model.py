"""The encoder: both streams, the fusions, and soft tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel, load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.schema import Schema
from tests.fake_device import fake_mps
from tests.resource.conftest import small_table, small_trainer, write_language_model


def soft(table: Table, language: LanguageModel, values: Tensor | None = None, **encoder: Any) -> Tensor:
    """Soft tokens of rows of the table."""
    codec = small_trainer(table, language, encoder=encoder).codec()
    return codec.soft(codec.embed(table.values if values is None else values))


def test_stream_a_is_the_mean_of_the_name_s_tokens_without_padding(table: Table, language: LanguageModel) -> None:
    found = Describer(language, table.schema).tool_vectors()
    weight = language.model.get_input_embeddings().weight
    names = table.schema.tools
    assert len(names[0]) != len(names[1]) and found.shape == (2, 16)
    for name, vector in zip(names, found, strict=True):
        tokens = language.tokenizer(name)["input_ids"]
        torch.testing.assert_close(vector, weight[tokens].mean(0))


@pytest.mark.parametrize("fusion", ["attention", "sum"])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_a_vector_is_as_many_soft_tokens_as_asked_for(
    fusion: str, tokens: int, table: Table, language: LanguageModel
) -> None:
    found = soft(table, language, fusion=fusion, tokens=tokens)
    assert found.shape == (16, tokens, 16) and bool(found.isfinite().all())
    # No two configurations, and no two tokens, are the same.
    assert float(torch.pdist(found.flatten(1)).min()) > 1e-4
    if tokens > 1:
        assert float(torch.pdist(found[0]).min()) > 1e-4


@pytest.mark.parametrize("fusion", ["attention", "sum"])
def test_both_streams_are_read(fusion: str, table: Table, language: LanguageModel) -> None:
    values = table.values[:1].repeat(3, 1)
    values[1, 0], values[2, 3] = 1, 101
    base, other_tool, other_number = soft(table, language, values, fusion=fusion)
    assert not torch.equal(base, other_tool) and not torch.equal(base, other_number)


def test_tools_whose_names_have_the_same_words_differ(tables: Path, language: LanguageModel) -> None:
    names = ("text_to_speech", "speech_to_text")
    table = small_table(tables)
    table = Table(Schema(table.schema.spec, names), table.values)
    vectors = Describer(language, table.schema).tool_vectors()
    torch.testing.assert_close(vectors[0], vectors[1])
    for fusion in ("attention", "sum"):
        values = table.values[:1].repeat(2, 1)
        values[1, 0] = 1
        first, second = soft(table, language, values, fusion=fusion)
        assert float((first - second).abs().max()) > 1e-2


def test_the_attention_has_the_seeds_heads(table: Table, language: LanguageModel) -> None:
    model = small_trainer(table, language).model
    assert model.attention is not None and model.attention.num_heads == 8
    assert small_trainer(table, language, encoder={"fusion": "sum"}).model.attention is None


def test_soft_tokens_are_as_large_as_token_embeddings(table: Table, language: LanguageModel) -> None:
    found = soft(table, language)
    assert float(found.std()) == pytest.approx(float(Describer(language, table.schema).tool_vectors().std()), rel=0.2)


def test_heads_that_do_not_divide_the_hidden_size_are_refused(table: Table, language: LanguageModel) -> None:
    with pytest.raises(InvalidInput, match="hidden size, 16, does not divide into 5 heads") as caught:
        small_trainer(table, language, encoder={"heads": 5})
    assert caught.value.violations[0].field == "spec.encoder.heads"
    # Without attention there are no heads.
    small_trainer(table, language, encoder={"fusion": "sum", "heads": 5})


def test_the_weights_follow_from_the_seed(table: Table, language: LanguageModel) -> None:
    for fusion in ("attention", "sum"):
        first, again, other = (
            small_trainer(table, language, encoder={"fusion": fusion}, seed=seed).model.state_dict()
            for seed in (0, 0, 1)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("numbers", ["digits", "fourier", "zscore", "xval", "raw"])
def test_what_is_saved_embeds_alike(numbers: str, table: Table, language: LanguageModel, tmp_path: Path) -> None:
    codec = small_trainer(table, language, encoder={"numbers": numbers, "tokens": 2}).codec()
    codec.save(tmp_path / "encoder")
    loaded = ResourceCodec.load(tmp_path / "encoder")
    assert torch.equal(loaded.embed(table.values), codec.embed(table.values))
    assert loaded.schema == codec.schema and loaded.spec == codec.spec and loaded.size == 32
    assert loaded.about["language_model_digest"] == language.digest


def test_a_language_model_of_another_size_has_vectors_of_its_own(table: Table, tmp_path: Path) -> None:
    wide = load_language_model(str(write_language_model(tmp_path / "model", hidden=24)))
    assert soft(table, wide).shape == (16, 1, 24)


def test_a_device_without_float64_gives_the_same_vectors(table: Table, language: LanguageModel, tmp_path: Path) -> None:
    codec = small_trainer(table, language, encoder={"numbers": "zscore"}).codec()
    codec.save(tmp_path / "encoder")
    with fake_mps() as device:
        there = ResourceCodec.load(tmp_path / "encoder", device)
        torch.testing.assert_close(there.embed(table.values), codec.embed(table.values))

"""What a frozen language model says of soft tokens: scores are those of the whole text, and so is what is written."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from ethogram.specs.resource import SchemaSpec
from services.language.models import LanguageModel, load_language_model
from services.resource import language_model
from services.resource.code import CONTENT, CONTENTS, FILE, SoftTokenCode
from services.resource.corpus import random_schema
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.language_model import LanguageModelTrainer
from services.resource.schema import Schema
from services.resource.texts import OPTIONS, READ, WRITE, Slot, Soft, Template, slot, slots
from services.resource.train import CODE_RATE, ResourceTrainer
from tests.resource.conftest import SCHEMA, TOOLS, small_trainer, tiny_reader_spec, tiny_spec, write_language_model


@pytest.fixture(scope="module")
def trained() -> LanguageModelTrainer:
    """A model of the form of the default one, as it is trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "_CORPUS", 10)
        return LanguageModelTrainer(tiny_reader_spec())


@pytest.fixture(scope="module")
def reader(trained: LanguageModelTrainer, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The same as others load it, which is shown slots behind each soft token."""
    folder = tmp_path_factory.mktemp("reader")
    trained.save(folder)
    return load_language_model(str(folder))


@pytest.fixture(params=["any", "reader"])
def model(request: pytest.FixtureRequest, language: LanguageModel, reader: LanguageModel) -> LanguageModel:
    return reader if request.param == "reader" else language


def soft_tokens(rows: int, tokens: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(seed))


def whole(describer: Describer, soft: Tensor, row: list[float], template: Template) -> tuple[Tensor, Tensor]:
    """Logits ``[length, vocabulary]`` and tokens of one description, from the whole text at once."""
    language = describer.language
    prompt, _ = describer._prompt(template)
    tokens = [
        token for text, _ in template.parts(row, marked=describer.reads_slots) for token in language.tokenize([text])[0]
    ]
    tokens.append(language.end_of_text)
    head = describer._head(soft.unsqueeze(0), template)
    inputs = torch.cat([describer.embed(torch.tensor([prompt])), head, describer.embed(torch.tensor([tokens]))], 1)
    logits = language.model(inputs_embeds=inputs).logits[0, len(prompt) + head.shape[1] - 1 : -1]
    return logits, torch.tensor(tokens)


@pytest.mark.parametrize("tokens", [1, 2])
@torch.no_grad()
def test_a_loss_is_that_of_the_whole_text_without_padding(model: LanguageModel, tokens: int, table: Table) -> None:
    describer, template = Describer(model, table.schema), table.schema.templates[0]
    # Descriptions of different lengths.
    values = table.values[[0, 6, 15]].clone()
    values[0, 3] = 5
    soft = soft_tokens(3, tokens)
    scores = describer.scores(soft, values, template)
    pairs = [whole(describer, *pair, template) for pair in zip(soft, values.tolist(), strict=True)]
    assert len({len(wanted) for _, wanted in pairs}) > 1
    losses = torch.cat([nn.functional.cross_entropy(*pair, reduction="none") for pair in pairs])
    torch.testing.assert_close(scores.loss, losses.mean(), rtol=1e-4, atol=1e-4)
    assert scores.exact.tolist() == [bool((logits.argmax(1) == wanted).all()) for logits, wanted in pairs]


@torch.no_grad()
def test_what_is_written_is_the_likeliest_token_each_time(model: LanguageModel, table: Table) -> None:
    describer, template = Describer(model, table.schema), table.schema.templates[1]
    soft = soft_tokens(3)
    texts = describer.write(soft, template)
    for vector, text in zip(soft, texts, strict=True):
        prompt, _ = describer._prompt(template)
        prefix = torch.cat([describer.embed(torch.tensor([prompt])), describer._head(vector.unsqueeze(0), template)], 1)
        tokens: list[int] = []
        for _ in range(8):
            inputs = torch.cat([prefix, describer.embed(torch.tensor([tokens], dtype=torch.long))], 1)
            tokens.append(int(model.model(inputs_embeds=inputs).logits[0, -1].argmax()))
        if model.end_of_text not in tokens:
            assert text.startswith(describer._text(tokens).rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_batch_says_what_each_row_says_alone(model: LanguageModel, table: Table) -> None:
    describer, template = Describer(model, table.schema), table.schema.templates[0]
    soft = soft_tokens(5, seed=3)
    together = describer.write(soft, template)
    assert together == [describer.write(row.unsqueeze(0), template)[0] for row in soft]
    assert describer.write(soft[:0], template) == []


def test_soft_tokens_learn_and_the_model_does_not(model: LanguageModel, table: Table) -> None:
    describer, template = Describer(model, table.schema), table.schema.templates[0]
    soft = soft_tokens(2).requires_grad_()
    describer.scores(soft, table.values[:2], template).loss.backward()  # type: ignore[no-untyped-call]
    assert soft.grad is not None and bool(soft.grad.abs().sum() > 0)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_a_model_that_knows_the_marks_is_shown_slots(
    reader: LanguageModel, language: LanguageModel, table: Table
) -> None:
    template = table.schema.templates[0]
    lengths = [Describer(model, table.schema)._head(soft_tokens(1), template).shape[1] for model in (language, reader)]
    cells = template.layout(1)
    assert [sum(isinstance(cell, kind) for cell in cells) for kind in (Soft, Slot)] == [4, sum(template.places)]
    assert cells[0] == READ and cells[-1] == WRITE and lengths[0] == 1 and lengths[1] >= len(cells)


def test_a_slot_is_the_soft_token_times_its_mark(reader: LanguageModel, table: Table) -> None:
    template, soft = table.schema.templates[0], soft_tokens(3, 2)
    wanted, before = [], soft[:, :1]
    for cell in template.layout(2):
        if isinstance(cell, Soft):
            before = soft[:, cell.index : cell.index + 1]
            wanted.append(before)
            continue
        (tokens,) = reader.tokenize([slot(cell.index) if isinstance(cell, Slot) else cell])
        embedded = reader.model.get_input_embeddings()(torch.tensor(tokens)).expand(3, -1, -1)
        wanted.append(embedded * before if isinstance(cell, Slot) else embedded)
    assert torch.equal(Describer(reader, table.schema)._head(soft, template), torch.cat(wanted, 1))


def coded(describer: Describer, table: Table, values: Tensor, tokens: int) -> Tensor:
    """Soft tokens of rows in the code of the language model."""
    template = table.schema.templates[0]
    contents = [[CONTENT[text] for field in template.contents(row) for text in field] for row in values.tolist()]
    code = SoftTokenCode.load(describer.language.folder, 16, "model")
    assert code is not None
    soft: Tensor = code(torch.tensor(contents), slots(template, tokens))
    return soft


@pytest.mark.parametrize("fusion", ["attention", "sum"])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_an_encoder_begins_as_the_code_of_its_language_model(
    tokens: int, fusion: str, reader: LanguageModel, table: Table
) -> None:
    values = table.values.clone()
    values[:4, 3] = torch.tensor([1, 10, 1998, 0], dtype=torch.float64)
    trainer = small_trainer(table, reader, encoder={"tokens": tokens, "fusion": fusion})
    unknown = torch.zeros_like(values, dtype=torch.bool)
    wanted = coded(trainer.describer, table, values, tokens)
    torch.testing.assert_close(trainer.embed(values, unknown), wanted, rtol=1e-4, atol=1e-5)
    # Of a field that is unknown the slots are empty.
    unknown[:, 3] = True
    values[0, 3] = 1
    other, again = trainer.embed(values, unknown), trainer.embed(values.index_fill(1, torch.tensor(3), 7.0), unknown)
    assert torch.equal(other, again) and not torch.allclose(other, wanted)
    # What is zero at first is learned all the same.
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    for _ in range(2):
        trainer.advance()
    still = [name for name, weight in trainer.model.named_parameters() if torch.equal(weight, before[name])]
    assert still == []
    random = small_trainer(table, reader, encoder={"tokens": tokens, "fusion": fusion, "initialization": "random"})
    assert not torch.allclose(random.embed(values, unknown), other)


@pytest.mark.parametrize("content", ["cut", "foreign"])
def test_a_code_that_is_none_is_named(content: str, reader: LanguageModel, table: Table, tmp_path: Path) -> None:
    folder = shutil.copytree(reader.folder, tmp_path / "model")
    file = folder / FILE
    if content == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        SoftTokenCode(8).save(folder)
    language = load_language_model(str(folder), field="spec.llm_model")
    with pytest.raises(InvalidInput, match=f"spec.llm_model: .*{FILE}"):
        small_trainer(table, language)
    assert small_trainer(table, language, encoder={"initialization": "random"}).code is None


@pytest.mark.parametrize("form", ["fourier", "xval", "zscore", "raw"])
def test_with_other_features_categories_alone_begin_as_the_code(form: str, reader: LanguageModel, table: Table) -> None:
    trainer = small_trainer(table, reader, encoder={"numbers": form, "fusion": "sum"})
    values, unknown = table.values[:1].repeat(2, 1), torch.zeros(2, 4, dtype=torch.bool)
    values[1, :2] = 1
    code, model = trainer.code, trainer.model
    assert code is not None
    changes = code.vectors()
    first, options = len(CONTENTS) - OPTIONS, table.schema.templates[0].options
    wanted = sum(changes[slot, first + options[slot] + 1] - changes[slot, first + options[slot]] for slot in (0, 1))
    features = model.features(values[:, 1:], unknown[:, 1:])
    indicator = torch.nn.functional.one_hot(values[:, 0].long(), 2).float()
    mixed = model.direct(features) + model.tool(torch.cat([model.tool_vectors, indicator], 1))
    torch.testing.assert_close(mixed[1] - mixed[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bare", [False, True])
@torch.no_grad()
def test_encoders_train_on_what_the_model_was_trained_on(
    bare: bool, trained: LanguageModelTrainer, reader: LanguageModel, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With other words nothing could be read back.
    monkeypatch.setattr(language_model, "_OTHER_WORDS", 0.0)
    item = trained.item(random.Random(3), 4, partial(random_schema, count=5, most_labels=3, bare=bare))
    template, soft = item.schema.template, trained.soft(item)
    describer = Describer(reader, table.schema)
    texts = [describer._text(row[:-1]) for row in item.descriptions]
    values = torch.tensor([template.read(text) for text in texts], dtype=torch.float64)
    scores = describer.scores(soft, values, template)
    torch.testing.assert_close(scores.loss, trained.losses([item], [soft]).losses.mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "enough"), [(1, False), (2, False), (4, True), (8, True)])
def test_more_characters_than_soft_tokens_have_slots_for_are_refused(
    tokens: int, enough: bool, reader: LanguageModel
) -> None:
    names = [f"d{index}" for index in range(12)]
    dimensions = [{"name": name, "low": 0, "high": 999_999} for name in names]
    templates = [{"name": "all", "text": "{tool} " + " ".join(f"{{{name}}}" for name in names)}]
    schema = Schema(SchemaSpec.model_validate({"dimensions": dimensions, "templates": templates}), TOOLS)
    values = torch.cat([torch.zeros(4, 1), torch.arange(48).view(4, 12)], 1).double()
    spec = tiny_spec(encoder={"tokens": tokens})

    def train() -> None:
        trainer = ResourceTrainer(spec, Table(schema, values), torch.arange(4), Describer(reader, schema))
        trainer.advance()

    if enough:
        train()
    else:
        with pytest.raises(InvalidInput, match=f"{tokens} soft token.*at least 4; take more") as caught:
            train()
        assert caught.value.violations[0].field == "spec.encoder.tokens"


def test_a_value_has_the_same_tokens_wherever_it_stands(model: LanguageModel, table: Table) -> None:
    describer = Describer(model, table.schema)
    for template in table.schema.templates:
        (row,) = describer.tokens(template, table.values[5:6])
        for index in range(4):
            (value,) = model.tokenize([template.value_text(index, float(table.values[5, index]))])
            assert any(row[place : place + len(value)] == value for place in range(len(row)))
        assert row[-1] == model.end_of_text and model.end_of_text not in row[:-1]


def test_a_description_longer_than_the_context_is_refused(table: Table, tmp_path: Path) -> None:
    short = load_language_model(str(write_language_model(tmp_path / "model", context=80)), field="spec.llm_model")
    describer = Describer(short, table.schema)
    for act in (
        lambda: describer.scores(soft_tokens(1), table.values[:1], table.schema.templates[0]),
        lambda: describer.write(soft_tokens(1), table.schema.templates[0]),
    ):
        with pytest.raises(InvalidInput, match="and the model takes 80; shorten the template") as caught:
            act()
        assert caught.value.violations[0].field == "spec.llm_model"


def test_a_description_that_may_grow_too_long_is_refused_before_training(table: Table, tmp_path: Path) -> None:
    """Descriptions of the table fit, and those of larger numbers would not."""
    template = table.schema.templates[0]
    plain = load_language_model(str(write_language_model(tmp_path / "model")))
    describer = Describer(plain, table.schema)
    prompt = len(describer._prompt(template)[0])
    lengths = [len(row) for row in describer.tokens(template, table.values)]
    context = prompt + 1 + max(lengths)
    tight = load_language_model(str(write_language_model(tmp_path / "tight", context=context)), field="spec.llm_model")
    describer = Describer(tight, table.schema)
    describer.scores(soft_tokens(16), table.values, template)
    with pytest.raises(InvalidInput, match=f"and the model takes {context}") as caught:
        ResourceTrainer(tiny_spec(), table, torch.arange(16), describer)
    assert caught.value.violations[0].field == "spec.llm_model"


def test_a_tokenizer_that_changes_a_text_is_refused(table: Table, tmp_path: Path) -> None:
    """As those do that put a space before each part of a text, or write it in small letters."""
    folder = write_language_model(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    spaced = load_language_model(str(folder), field="spec.llm_model")
    with pytest.raises(InvalidInput, match=r"turns the description 'detect small c .* into ' detect +small") as caught:
        Describer(spaced, table.schema)
    assert caught.value.violations[0].field == "spec.llm_model"
    # Of one label alone.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.Replace("translate", "Translate")
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(InvalidInput, match="into 'Translate large"):
        Describer(load_language_model(str(folder)), table.schema)


def test_a_model_with_marks_of_another_version_is_refused(reader: LanguageModel, table: Table, tmp_path: Path) -> None:
    """Read as any other model it would say nothing that makes sense."""
    folder = shutil.copytree(reader.folder, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<|edge ", "<|other "))
    other = load_language_model(str(folder), field="spec.llm_model")
    with pytest.raises(InvalidInput, match=r"spec.llm_model: .* by another version; train language model"):
        Describer(other, table.schema)


@pytest.mark.parametrize(("form", "share"), [("digits", CODE_RATE), ("fourier", 1.0)])
def test_an_encoder_that_begins_as_the_code_learns_slowly(
    form: str, share: float, reader: LanguageModel, language: LanguageModel, table: Table
) -> None:
    def rates(model: LanguageModel) -> list[float]:
        trainer = small_trainer(table, model, encoder={"numbers": form})
        trainer.advance()
        return [group["lr"] for group in trainer.optimization.optimizer.param_groups]

    encoder, estimates = rates(reader)
    assert encoder == share * estimates
    # Any other model has no code.
    assert len(set(rates(language))) == 1


def test_a_text_in_letters_of_any_script_is_read_back(language: LanguageModel) -> None:
    labels = ["klein ä", "大きい"]
    dimensions = [{"name": "size", "labels": labels}, *SCHEMA["dimensions"][1:]]
    schema = Schema(SchemaSpec.model_validate(SCHEMA | {"dimensions": dimensions}), TOOLS)
    describer, template = Describer(language, schema), schema.templates[0]
    (row,) = describer.tokens(template, torch.tensor([[0.0, 1, 4, 17]]))
    text = language.tokenizer.decode(row[:-1], skip_special_tokens=False)
    assert template.read(text) == [0, 1, 4, 17]

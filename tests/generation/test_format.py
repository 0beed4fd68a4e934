"""Records as text, and answers read back and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ethogram.errors import InvalidInput
from ethogram.specs.generation import FormatSpec, GenerationSpec
from services.generation.format import TrainingDataFormatter, parse_patterns, parse_weights
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.score import benchmark_of, score_classification, score_modification, with_positive
from services.zoo.patterns import Pattern, from_specs
from services.zoo.pools import Evaluation
from services.zoo.subjects import Architecture, flatten
from services.zoo.universe import Universe
from tests.generation.conftest import records, small_spec, staged_spec
from tests.hub_server import reach

SPEC = staged_spec()
PATTERNS = from_specs(SPEC.patterns, 5, 4)


@pytest.fixture(scope="module")
def rows(staged: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    return records(staged[0])


def shape(row: dict[str, Any]) -> Architecture:
    return Architecture(5, 4, "one_hot", (row["neurons"],) * row["layers"], row["activation"])


def formatter(**fields: Any) -> TrainingDataFormatter:
    return TrainingDataFormatter(SPEC.model_copy(update={"format": FormatSpec(**fields)}), PATTERNS)


@pytest.mark.parametrize("style", ["separate", "interwoven"])
def test_nine_digits_keep_every_bit(rows: list[dict[str, Any]], style: str) -> None:
    for row in rows:
        text = formatter(digits=9, style=style).modification(row).completion
        assert flatten(parse_weights(text, shape(row)))[0].tolist() == np.asarray(row["weights"], np.float32).tolist()


@pytest.mark.parametrize("style", ["separate", "interwoven"])
def test_prompts_hold_what_the_task_needs_and_not_its_answer(rows: list[dict[str, Any]], style: str) -> None:
    made = formatter(style=style)
    for row in rows[:5]:
        modification, classification = made.modification(row), made.classification(row)
        assert row["target_pattern"] in modification.prompt
        layers = "1 hidden layer" if row["layers"] == 1 else f"{row['layers']} hidden layers"
        assert f"{layers} of {row['neurons']} neurons, {row['activation']}" in modification.prompt
        number = f"{row['degraded_weights'][0]:.4g}"
        assert number in modification.prompt
        assert f"mean {row['degraded_signature']['mean'][0]:.4g}" in modification.prompt
        assert f"mean {row['signature']['mean'][0]:.4g}" in classification.prompt
        for pattern in PATTERNS:
            assert f"- {pattern.name}: {pattern.description}" in classification.prompt
        assert parse_patterns(classification.completion, PATTERNS) == row["positive_patterns"]
        assert modification.text == modification.prompt + modification.completion


def test_answers_are_scored(rows: list[dict[str, Any]]) -> None:
    benchmark = Evaluation.build(Universe(5, 4, PATTERNS), 64, 64)
    made = formatter(digits=9)
    for row in rows[:5]:
        perfect = score_modification(made.weights(row, "weights"), row, SPEC, PATTERNS, benchmark)
        assert perfect.gain == pytest.approx(perfect.reference_gain, abs=1e-6)
        idle = score_modification(made.weights(row, "degraded_weights"), row, SPEC, PATTERNS, benchmark)
        assert idle.gain == idle.others == 0.0


def test_classification_answers_are_scored_by_what_was_measured(rows: list[dict[str, Any]]) -> None:
    names = [pattern.name for pattern in PATTERNS]
    row = rows[0] | {"patterns": names[:2], "positive_patterns": names[1:3]}
    assert score_classification(", ".join(names[1:3]), row, PATTERNS) == (1.0, 1.0, True)
    assert score_classification(", ".join(names[:2]), row, PATTERNS) == (0.5, 0.5, False)
    assert score_classification(f"I think it is {names[1].upper()}.", row, PATTERNS) == (1.0, 0.5, False)
    assert score_classification("no idea", row, PATTERNS) == score_classification("None.", row, PATTERNS)
    assert score_classification("no idea", row, PATTERNS) == (0.0, 0.0, False)
    # A network that classifies nothing as positive, trained or not: that must be said.
    nothing = row | {"positive_patterns": []}
    assert formatter().classification(nothing).completion == "none\n"
    assert score_classification("none\n", nothing, PATTERNS) == (1.0, None, True)
    assert score_classification("no idea", nothing, PATTERNS) == (0.0, None, False)
    assert score_classification(names[0], nothing, PATTERNS) == (0.0, None, False)
    # Where it was not recorded it is measured.
    unknown = rows[0] | {"positive_patterns": None, "yes_share": None}
    found = with_positive(unknown, SPEC, PATTERNS, lambda: benchmark_of(SPEC, PATTERNS))
    assert found["positive_patterns"] == rows[0]["positive_patterns"]


@pytest.mark.parametrize(
    ("spoil", "field", "said"),
    [
        (lambda text: text.replace("layer 0 bias", "layer 7 bias"), "completion.layers.0.bias", "is missing"),
        (
            lambda text: "\n".join(text.splitlines()[:1] + text.splitlines()[2:]),
            "completion.layers.0.weight",
            "numbers, not",
        ),
        (lambda text: "", "completion.layers.0.weight", "is missing"),
        (lambda text: text.replace("layer 0 bias\n", "layer 0 bias\n1e999 "), "completion.layers.0.bias", "numbers"),
    ],
)
def test_an_answer_that_is_no_network_is_told(rows: list[dict[str, Any]], spoil: Any, field: str, said: str) -> None:
    text = spoil(formatter().weights(rows[0], "weights"))
    with pytest.raises(InvalidInput, match=said) as caught:
        parse_weights(text, shape(rows[0]))
    assert caught.value.violations[0].field.startswith(field)


def test_names_within_names_are_told_apart() -> None:
    patterns = [Pattern("mine", regex="A.*"), Pattern("mine_too", regex="B.*"), Pattern("starts_with", 0)]
    assert parse_patterns("mine_too and starts_with(A)", patterns) == ["mine_too", "starts_with(A)"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One that splits at blanks, saved as any other."""
    words = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_records_hold_prompts_and_counts_of_tokens(tokenizer: Path, tmp_path: Path) -> None:
    spec = staged_spec(subjects=6, format={"tokenizer": str(tokenizer), "style": "interwoven"})
    figures = DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    rows = records(tmp_path / "zoo")
    for task in ("modification", "classification"):
        counts = [len((row[f"{task}_prompt"] + row[f"{task}_completion"]).split()) for row in rows]
        assert [row[f"{task}_tokens"] for row in rows] == counts
        assert figures["tokens"][task] == {"mean": pytest.approx(np.mean(counts), abs=0.05), "max": max(counts)}
    assert "Tokens of a modification record" in (tmp_path / "zoo" / "README.md").read_text()
    table = load_dataset("parquet", data_dir=str(tmp_path / "zoo" / "data"), cache_dir=str(tmp_path / "cache"))["train"]
    assert table[0]["classification_prompt"] == rows[0]["classification_prompt"]


def test_without_a_hub_a_tokenizer_is_not_asked_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    reach("http://127.0.0.1:9", monkeypatch, tmp_path)
    with pytest.raises(InvalidInput, match=r"spec\.format\.tokenizer: cannot load them/words"):
        DatasetGenerationPipeline(staged_spec(format={"tokenizer": "them/words"}))
    assert "Retry" not in capfd.readouterr().err


def test_a_tokenizer_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        DatasetGenerationPipeline(staged_spec(format={"tokenizer": str(tmp_path / "nothing")}))
    assert caught.value.violations[0].field == "spec.format.tokenizer"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": {"include_modification": True}}, "needs staged training"),
        ({"format": {"include_classification": False}}, "includes no task"),
    ],
)
def test_tasks_that_cannot_be_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenerationSpec.model_validate(changes)


def test_of_one_stage_there_is_classification_alone(tmp_path: Path) -> None:
    spec = GenerationSpec.model_validate(small_spec(subjects=3).model_dump() | {"format": {}})
    DatasetGenerationPipeline(spec).run(tmp_path / "zoo")
    row = records(tmp_path / "zoo")[0]
    assert "modification_prompt" not in row and parse_patterns(row["classification_completion"], PATTERNS)


def test_words_around_an_answer_are_no_part_of_it(rows: list[dict[str, Any]]) -> None:
    own = formatter(digits=9).weights(rows[0], "weights")
    dressed = "Here it is:\n\n" + own.replace("weight", "Weights").replace("\n", ":\n", 1) + "\nDone in 3 layers.\n"
    expected, found = (parse_weights(text, shape(rows[0])) for text in (own, dressed))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    patterns = [Pattern("palindrome"), Pattern("no_repeats")]
    assert parse_patterns("nonpalindrome, palindromes; no_repeats!", patterns) == ["no_repeats"]


def test_numbers_that_float32_does_not_hold(rows: list[dict[str, Any]]) -> None:
    text = formatter().weights(rows[0], "weights")
    first = text.splitlines()[1].split()[0]
    with pytest.raises(InvalidInput, match="not finite"):
        parse_weights(text.replace(first, "1e300", 1), shape(rows[0]))

"""Texts of tasks say which tool and which configuration is wanted, and nothing of what is measured."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel
from services.resource.decoder import tasks
from services.resource.decoder.tasks import TaskTexts, spaced, spelled
from services.resource.export import TOOL_NAME, Export, export
from tests.resource.conftest import small_table, small_trainer


def phrases(texts: TaskTexts, name: str, value: object) -> set[str]:
    """Every phrase that may stand for a value."""
    found = set()
    for seed in range(200):
        found.add(texts._phrase(name, value, random.Random(seed)))
    return found


def values_in(text: str, texts: TaskTexts, name: str) -> Iterator[object]:
    """The values of a dimension that a text asks for."""
    for value in dict.fromkeys(row[name] for row in texts.rows):
        if any(re.search(rf"(?<![\w.-]){re.escape(phrase)}(?![\w-])", text) for phrase in phrases(texts, name, value)):
            yield value


def test_a_text_determines_tool_and_configuration(exported: Export) -> None:
    texts = TaskTexts(exported)
    assert texts.chosen == ["size", "cores"]
    rng = random.Random(0)
    for configuration, row in enumerate(texts.rows):
        for _ in range(4):
            text = texts.draw(configuration, rng)
            tools = [tool for tool in exported.schema.tools if spaced(tool) in text]
            assert tools == [row[TOOL_NAME]], text
            for name in texts.chosen:
                assert list(values_in(text, texts, name)) == [row[name]], text


def test_texts_vary_and_follow_from_their_seed(exported: Export) -> None:
    texts = TaskTexts(exported)
    drawn = [texts.draw(3, random.Random(seed)) for seed in range(50)]
    assert len(set(drawn)) > 25
    assert drawn[7] == texts.draw(3, random.Random(7))
    assert any("eight" in text for text in drawn) and any("8" in text for text in drawn)


def test_nothing_that_is_measured_is_said(exported: Export) -> None:
    texts = TaskTexts(exported)
    for seed in range(30):
        text = texts.draw(seed % 16, random.Random(seed))
        assert "latency" not in text and " ms" not in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "zero"), (4, "four"), (13, "thirteen"), (17, "seventeen"), (18, "eighteen"), (19, "nineteen"), (20, "twenty"),
     (40, "forty"), (58, "fifty-eight"), (99, "ninety-nine")],
)  # fmt: skip
def test_numbers_in_words(number: int, text: str) -> None:
    assert spelled(number) == text


def test_numbers_in_words_differ() -> None:
    assert len({spelled(number) for number in range(100)}) == 100


def test_a_unit_is_said_once(exported: Export) -> None:
    texts = TaskTexts(exported)
    texts.units["memory_gb"] = "GB"
    said = phrases(texts, "memory_gb", 16.0)
    assert {"with 16 GB memory", "memory of 16 GB", "16 GB memory"} <= said
    assert not any("gb" in text for text in said)


def test_repeated_measurements_cannot_be_told_apart(tables: Path, language: LanguageModel, tmp_path: Path) -> None:
    table = small_table(tables, repeated=True)
    made = export(small_trainer(table, language).codec(), table, tmp_path)
    with pytest.raises(InvalidInput, match="export: has repeated measurements of a configuration"):
        TaskTexts(made)


def test_forms_hold_what_they_must() -> None:
    assert all("{value}" in form and "{name}" in form for form in (*tasks._NUMBERS, *tasks._LABELS))
    assert all("{tool}" in form for form in tasks._OPENINGS)

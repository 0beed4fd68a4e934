"""Texts of tasks say which tool and which configuration is wanted, and nothing of what is measured."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ethogram.errors import InvalidInput
from ethogram.specs.resource import ResourceSpec
from services.language.models import LanguageModel
from services.resource.data import Table
from services.resource.decoder import tasks
from services.resource.decoder.tasks import TaskTexts, spaced, spelled
from services.resource.export import TOOL_NAME, Export, export
from services.resource.job import table_of
from services.resource.schema import Schema
from tests.recorder import Recorder
from tests.resource.conftest import small_table, small_trainer


def phrases(texts: TaskTexts, name: str, value: object) -> set[str]:
    """Every phrase that may stand for a value."""
    found = set()
    for seed in range(200):
        found.add(texts._phrase(name, value, random.Random(seed)))
    return found


def test_a_text_determines_tool_and_configuration(exported: Export) -> None:
    texts = TaskTexts(exported)
    assert texts.chosen == ["size", "cores"]
    determines(texts, exported.schema.tools, range(16))


def test_a_text_determines_a_configuration_of_the_seven_tools(language: LanguageModel, tmp_path: Path) -> None:
    """Two of the fields are memory, with the same unit and the same levels."""
    table = table_of(ResourceSpec(), Recorder())
    made = export(small_trainer(table, language).codec(), table, tmp_path)
    determines(TaskTexts(made), table.schema.tools, range(0, 1701, 17))


def determines(texts: TaskTexts, tools: Sequence[str], configurations: Iterable[int]) -> None:
    """Each phrase of a text stands for one value of one dimension, and all of them for the configuration."""
    meaning: dict[str, set[tuple[str, object]]] = {}
    for name in texts.chosen:
        for value in dict.fromkeys(row[name] for row in texts.rows):
            for phrase in phrases(texts, name, value):
                meaning.setdefault(phrase, set()).add((name, value))
    assert {len(found) for found in meaning.values()} == {1}
    openings = {opening.format(tool=spaced(tool)): tool for opening in tasks._OPENINGS for tool in tools}
    assert len(openings) == len(tasks._OPENINGS) * len(tools)
    rng = random.Random(0)
    for configuration in configurations:
        row = texts.rows[configuration]
        for _ in range(3):
            text = texts.draw(configuration, rng)
            opening, *said = re.split(r", | and ", text.removesuffix("."))
            assert openings[opening] == row[TOOL_NAME], text
            assert {pair for phrase in said for pair in meaning[phrase]} == {(n, row[n]) for n in texts.chosen}, text


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


@pytest.mark.parametrize("value", [1234567, 1234567.0, 1234568, 1234567.125, 0.125, 9_999_999])
def test_a_number_has_all_its_digits(value: float, exported: Export) -> None:
    said = phrases(TaskTexts(exported), "cores", value)
    assert f"with {float(value)} cores".replace(".0 ", " ") in said


def test_repeated_measurements_cannot_be_told_apart(tables: Path, language: LanguageModel, tmp_path: Path) -> None:
    table = small_table(tables, repeated=True)
    made = export(small_trainer(table, language).codec(), table, tmp_path)
    with pytest.raises(InvalidInput, match="export: has repeated measurements of a configuration"):
        TaskTexts(made)


def test_labels_of_the_same_words_cannot_be_told_apart(tables: Path, language: LanguageModel, tmp_path: Path) -> None:
    table = small_table(tables)
    table = Table(Schema(table.schema.spec, ("Big_Job", "big job")), table.values)
    made = export(small_trainer(table, language).codec(), table, tmp_path)
    with pytest.raises(InvalidInput, match="has 'Big_Job' and 'big job' in tool; no text tells them apart"):
        TaskTexts(made)


def test_forms_hold_what_they_must() -> None:
    assert all("{value}" in form and "{name}" in form for form in (*tasks._NUMBERS, *tasks._LABELS))
    assert all("{tool}" in form for form in tasks._OPENINGS)

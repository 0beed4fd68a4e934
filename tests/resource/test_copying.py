"""Texts to copy: the second follows from the first, and contexts say where."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.resource.copying import LEVELS, Copies, Vocabulary, draw_copies
from services.resource.texts import OPTIONS, SLOTS
from services.runtime.seeds import generator

READ, WRITE, END, LABEL_END = 1, 2, 3, 4
OPTION, SLOT, WORD, SIZE, CHARACTERS = 10, 200, 300, 400, 12
CONTENTS = torch.tensor([0, *range(SIZE - CHARACTERS + 1, SIZE), *range(OPTION, OPTION + OPTIONS)])
VOCABULARY = Vocabulary(READ, WRITE, END, LABEL_END, SLOT, WORD, SIZE - CHARACTERS + 1, CONTENTS, CHARACTERS)
ROWS = 3


def draw(seed: int, level: int) -> Copies:
    return draw_copies(random.Random(seed), generator(seed, "copies"), level, ROWS, VOCABULARY)


def copied(copies: Copies, row: int) -> list[int]:
    """The second text, read off the first and the contents of its slots."""
    shown = copies.before[row].tolist()
    start = shown.index(READ)
    legend: dict[int, list[int]] = {}
    for token in shown[:start]:
        if OPTION <= token < OPTION + OPTIONS:
            legend[token] = []
        [*legend.values()][-1].append(token)
    soft = dict(copies.soft)
    contents = iter(CONTENTS[copies.contents[row]].tolist())
    written: list[int] = []
    for column, token in enumerate(shown[start + 1 : -1], start + 1):
        if column in soft:
            continue
        is_word = WORD <= token < VOCABULARY.size
        content = token if is_word else next(contents)
        written += legend.get(content, [content]) if content else []
    return [*written, END]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, LEVELS), st.integers(0, ROWS - 1))
def test_the_second_text_follows_from_the_first(seed: int, level: int, row: int) -> None:
    copies = draw(seed, level)
    assert copied(copies, row) == copies.after[row].tolist()
    assert sum(copies.slots) == copies.contents.shape[1] and max(copies.slots, default=0) <= SLOTS
    assert copies.before[row, -1] == WRITE
    slots = [column for column, token in enumerate(copies.before[row].tolist()) if SLOT <= token < SLOT + SLOTS]
    assert [column for column, _ in copies.slotted] == slots
    # A slot is of the soft token before it.
    for column, number in copies.slotted:
        assert number == [soft for place, soft in copies.soft if place < column][-1]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, LEVELS))
def test_a_context_is_where_both_texts_have_the_same_to_write(seed: int, level: int) -> None:
    copies = draw(seed, level)
    last = copies.before.shape[1] - 1
    shown, values = copies.before[0].tolist(), iter(CONTENTS[copies.contents[0]].tolist())
    soft = dict(copies.soft)
    start = shown.index(READ) + 1
    is_gap = [
        column >= start and column not in soft and not WORD <= token < VOCABULARY.size
        for column, token in enumerate(shown[:last])
    ]
    content = [next(values) if gap else token for gap, token in zip(is_gap, shown, strict=False)]
    places: dict[tuple[int, ...], set[int]] = {}
    for column, before, since in zip(*copies.contexts, strict=True):
        if column <= last:
            places.setdefault((*before[0].tolist(), since), set()).add([*content, END][column])
    for column, before, since in zip(*copies.contexts, strict=True):
        if column > last:
            wanted = copies.after[0, column - last].item()
            assert wanted in places[(*before[0].tolist(), since)]


@pytest.mark.parametrize("level", range(LEVELS + 1))
def test_what_a_level_has(level: int) -> None:
    drawn = [draw(seed, level) for seed in range(40)]
    assert any(copies.soft for copies in drawn) is (level > 0)
    assert any(copies.marks for copies in drawn) is (level > 1)
    shown = torch.cat([copies.before.flatten() for copies in drawn])
    assert bool(((shown >= SLOT) & (shown < SLOT + SLOTS)).any()) is (level == LEVELS)


def test_a_label_stands_between_its_mark_and_the_mark_of_its_end() -> None:
    lengths = set()
    for copies in (draw(seed, LEVELS) for seed in range(200)):
        ends = (copies.before[0] == LABEL_END).nonzero().flatten().tolist()
        for (column, mark), end in zip(copies.marks, ends, strict=True):
            assert torch.equal(copies.before[:, column - 1], mark)
            assert bool((copies.before[:, column:end] >= WORD).all()) and bool(
                (copies.before[:, end] == LABEL_END).all()
            )
            lengths.add(end - column)
    assert lengths == set(range(1, 13))

"""Texts to copy: the second follows from the first, and contexts say where."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.resource.copying import Copies, Vocabulary, contexts, draw_copies
from services.resource.texts import EDGES, OPTIONS, SLOTS
from services.runtime.seeds import generator

READ, WRITE, END, LABEL_END = 1, 2, 3, 4
OPTION, EDGE, SLOT, WORD, SIZE, CHARACTERS = 10, 200, 300, 400, 500, 12
CONTENTS = torch.tensor([0, *range(SIZE - CHARACTERS + 1, SIZE), *range(OPTION, OPTION + OPTIONS)])
VOCABULARY = Vocabulary(
    read=READ,
    write=WRITE,
    end=END,
    label_end=LABEL_END,
    option=OPTION,
    edge=EDGE,
    slot=SLOT,
    word=WORD,
    size=SIZE - CHARACTERS + 1,
    contents=CONTENTS,
    characters=CHARACTERS,
)
ROWS = 3


def draw(seed: int, *, gaps: bool) -> Copies:
    return draw_copies(random.Random(seed), generator(seed, "copies"), ROWS, VOCABULARY, gaps=gaps)


def is_edge(token: int) -> bool:
    return EDGE <= token < EDGE + EDGES


def filled(copies: Copies, row: int) -> list[int]:
    """The first text with what its gaps hold; -1 for soft tokens."""
    soft, contents = dict(copies.soft), iter(CONTENTS[copies.contents[row]].tolist())
    found: list[int] = []
    in_gap = False
    for column, token in enumerate(copies.before[row].tolist()):
        in_gap = (in_gap and not is_edge(token)) or column in soft
        found.append(-1 if column in soft else next(contents) if in_gap else token)
    return found


def copied(copies: Copies, row: int) -> list[int]:
    """The second text, read off the first."""
    shown = filled(copies, row)
    start = shown.index(READ)
    legend: dict[int, list[int]] = {}
    for token in shown[:start]:
        if OPTION <= token < OPTION + OPTIONS:
            legend[token] = []
        [*legend.values()][-1].append(token)
    written: list[int] = []
    for token in shown[start + 1 : -1]:
        # A blank is not written.
        written += legend.get(token, [token]) if token > 0 else []
    return [*written, END]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(0, ROWS - 1))
def test_the_second_text_follows_from_the_first(seed: int, gaps: bool, row: int) -> None:
    copies = draw(seed, gaps=gaps)
    assert copied(copies, row) == copies.after[row].tolist()
    assert sum(copies.slots) == copies.contents.shape[1] and max(copies.slots, default=0) <= SLOTS
    assert copies.before[row, -1] == WRITE
    slots = [column for column, token in enumerate(copies.before[row].tolist()) if SLOT <= token < SLOT + SLOTS]
    assert [column for column, _ in copies.slotted] == slots
    # A slot is of the soft token before it.
    for column, number in copies.slotted:
        assert number == [soft for place, soft in copies.soft if place < column][-1]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.integers(0, ROWS - 1))
def test_a_context_is_where_both_texts_have_the_same_to_write(seed: int, gaps: bool, row: int) -> None:
    copies = draw(seed, gaps=gaps)
    tokens = torch.cat([copies.before, copies.after], 1)
    soft = torch.zeros(tokens.shape[1], dtype=torch.bool)
    soft[[column for column, _ in copies.soft]] = True
    found = [*zip(*(part[row].tolist() for part in contexts(tokens, soft, VOCABULARY)), strict=True)]
    shown = [*filled(copies, row)[:-1], END]
    wanted = {found[key]: shown[key] for key in copies.keys}
    assert len(wanted) == len(copies.keys), "no two columns have the same context"
    for context, token in zip(found[len(shown) :], copies.after[row].tolist(), strict=True):
        # Where a value is shorter than its place, its end comes next.
        assert wanted[context] == token or (wanted[context] == 0 and is_edge(token))


@pytest.mark.parametrize("gaps", [False, True])
def test_gaps_have_slots_and_labels(gaps: bool) -> None:
    drawn = [draw(seed, gaps=gaps) for seed in range(40)]
    assert any(copies.soft for copies in drawn) is gaps
    shown = torch.cat([copies.before.flatten() for copies in drawn])
    assert bool((shown == LABEL_END).any()) is gaps
    assert bool(((shown >= SLOT) & (shown < SLOT + SLOTS)).any()) is gaps


def test_a_label_stands_between_its_mark_and_the_mark_of_its_end() -> None:
    lengths = set()
    for copies in (draw(seed, gaps=True) for seed in range(200)):
        shown = copies.before
        for end in (shown[0] == LABEL_END).nonzero().flatten().tolist():
            assert bool((shown[:, end] == LABEL_END).all())
            start = end
            while shown[0, start - 1] >= WORD:
                start -= 1
            mark = shown[:, start - 1]
            assert bool(((mark >= OPTION) & (mark < OPTION + OPTIONS)).all() and (shown[:, start:end] >= WORD).all())
            lengths.add(end - start)
    assert lengths == set(range(1, 13))

"""Pairs of random texts, the second of which is to be copied from the first, in the form of descriptions."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from services.resource.texts import SLOTS

LEVELS = 3
"""How hard copying can be. From level 1 on the first text has gaps: soft tokens, which the second leaves out, and
values behind them, with blanks. From level 2 on some values are marks of labels, which the second has with the label,
and all gaps may follow the same token. At level 3 values are in slots of the soft tokens."""
_LABELS = 0.4
"""Share of the gaps that have a label, where there are labels."""


_LONGEST_LABEL = 12
"""Tokens of a label at most."""


class Vocabulary(NamedTuple):
    """Numbers of tokens."""

    read: int
    write: int
    end: int
    label_end: int
    slot: int
    """The mark of the first slot."""
    word: int
    """The first one that is no mark."""
    size: int
    contents: Tensor
    """Of each content of a slot; the first is a blank, then come characters, then the marks of labels."""
    characters: int
    """How many contents are no labels, the blank among them."""


class Contexts(NamedTuple):
    """What says where a text goes on, for some columns of a batch."""

    columns: list[int]
    before: list[Tensor]
    """The two tokens of the template before each, ``[rows, 2]``; in a label its mark, twice."""
    since: list[int]
    """Contents of slots, or tokens of a label, since these tokens."""

    def add(self, column: int, before: Tensor, since: int) -> None:
        """Add a column."""
        self.columns.append(column)
        self.before.append(before)
        self.since.append(since)

    def add_label(self, column: int, mark: Tensor, length: int) -> None:
        """Add the columns of a label of some ``length`` behind its ``mark`` ``[rows, 1]``, and of its end."""
        for since in range(length + 1):
            self.add(column + since, mark.expand(-1, 2), since)


class Copies(NamedTuple):
    """A batch of pairs of texts of one form."""

    before: Tensor
    """The first text, up to the mark that asks for the second, ``[rows, length]``."""
    after: Tensor
    """The second, with the token that ends a text, ``[rows, length]``."""
    contents: Tensor
    """Index of the content of each slot, ``[rows, slots]``."""
    slots: list[int]
    """Of each soft token."""
    soft: list[tuple[int, int]]
    """Columns of the first text that have a soft token, and its number."""
    slotted: list[tuple[int, int]]
    """Columns of the first text that have a slot, and the number of its soft token."""
    contexts: Contexts
    """Columns of the first text with something to copy, and those before what is copied."""
    marks: list[tuple[int, Tensor]]
    """Columns that have a label's first token, and its mark, ``[rows]``."""


def draw_copies(
    rng: random.Random, generator: torch.Generator, level: int, rows: int, vocabulary: Vocabulary
) -> Copies:
    """Draw ``rows`` pairs. They have the same form, so that nothing is padded."""

    def token(number: int) -> Tensor:
        return torch.full((rows, 1), number)

    def words(count: int) -> Tensor:
        return torch.randint(vocabulary.word, vocabulary.size, (rows, count), generator=generator)

    size = rng.randint(0, 8) if level > 1 else 0
    options = len(vocabulary.contents) - vocabulary.characters
    chosen = torch.rand(rows, options, generator=generator).argsort(1)[:, :size] + vocabulary.characters
    separator = words(1 if level > 1 and rng.random() < 0.5 else 0)
    shown, written = _Text(words(0)), _Text(words(0))
    in_shown, in_written = Contexts([], [], []), Contexts([], [], [])
    names: list[Tensor] = []
    marks: list[tuple[int, Tensor]] = []
    # In half of the texts all labels are made of the same few tokens.
    few = words(rng.randint(2, 6) if rng.random() < 0.5 else 0)
    for mark in vocabulary.contents[chosen].unsqueeze(2).unbind(1):
        length = rng.randint(1, rng.randint(1, _LONGEST_LABEL))
        shown.add(mark)
        marks.append((shown.length, mark.squeeze(1)))
        in_shown.add_label(shown.length, mark, length)
        names.append(words(length))
        if few.shape[1]:
            names[-1] = few.gather(1, torch.randint(few.shape[1], (rows, length), generator=generator))
        shown.add(names[-1])
        shown.add(token(vocabulary.label_end))
    shown.add(token(vocabulary.read))
    contents: list[Tensor] = []
    slots: list[int] = []
    soft: list[tuple[int, int]] = []
    slotted: list[tuple[int, int]] = []
    before, since = token(vocabulary.read).expand(-1, 2), 0
    for _ in range(rng.randint(2, 8)):
        for word in torch.cat([words(rng.randint(1, 4)), separator], 1).unsqueeze(2).unbind(1):
            in_shown.add(shown.length, before, since)
            if written.length:
                in_written.add(written.length, before, since)
            shown.add(word)
            written.add(word)
            before, since = torch.cat([word, before[:, :1]], 1), 0
        if not level:
            continue
        if not slots or rng.random() < 0.2 or slots[-1] > SLOTS - 8:
            slots.append(0)
        soft.append((shown.length, len(slots) - 1))
        shown.add(token(vocabulary.read))
        if size and rng.random() < _LABELS:
            picked = rng.randrange(size)
            value, blanks, since = chosen[:, picked : picked + 1], 0, 1
            in_written.add(written.length, before, 0)
            in_written.add_label(written.length + 1, vocabulary.contents[value], names[picked].shape[1])
            for part in (vocabulary.contents[value], names[picked], token(vocabulary.label_end)):
                written.add(part)
        else:
            since, blanks = rng.randint(1, 6), rng.randint(0, 2)
            value = torch.randint(1, vocabulary.characters, (rows, since), generator=generator)
            for place in range(since):
                in_written.add(written.length + place, before, place)
            written.add(vocabulary.contents[value])
            value = nn.functional.pad(value, (0, blanks))
        for place in range(since):
            in_shown.add(shown.length + place, before, place)
        first = vocabulary.slot + slots[-1]
        places = torch.arange(first, first + since + blanks).expand(rows, -1)
        if level == LEVELS:
            slotted += [(shown.length + place, len(slots) - 1) for place in range(since + blanks)]
        shown.add(places if level == LEVELS else vocabulary.contents[value])
        slots[-1] += since + blanks
        contents.append(value)
    in_shown.add(shown.length, before, since)
    in_written.add(written.length, before, since)
    shown.add(token(vocabulary.write))
    written.add(token(vocabulary.end))
    # What is written at a column is predicted one before it; for the first that is the mark that asks for it.
    columns = in_shown.columns + [shown.length - 1 + column for column in in_written.columns]
    return Copies(
        before=shown.tokens,
        after=written.tokens,
        contents=torch.cat([words(0), *contents], 1),
        slots=slots,
        soft=soft,
        slotted=slotted,
        contexts=Contexts(columns, in_shown.before + in_written.before, in_shown.since + in_written.since),
        marks=marks,
    )


class _Text:
    """Tokens ``[rows, length]`` that grow."""

    def __init__(self, tokens: Tensor) -> None:
        self._parts, self.length = [tokens], tokens.shape[1]

    def add(self, tokens: Tensor) -> None:
        self._parts.append(tokens)
        self.length += tokens.shape[1]

    @property
    def tokens(self) -> Tensor:
        return torch.cat(self._parts, 1)

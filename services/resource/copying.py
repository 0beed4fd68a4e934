"""Pairs of random texts, the second of which is to be copied from the first, in the form of descriptions."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from services.resource.texts import EDGES, OPTIONS, SLOTS

_LABELS = 0.4
"""Share of the gaps that have a label, where there are labels."""
_LONGEST_LABEL = 12
"""Tokens of a label at most."""
_LONGEST_LITERAL = 12
"""Tokens of the template between two values at most."""


class Vocabulary(NamedTuple):
    """Numbers of tokens."""

    read: int
    write: int
    end: int
    label_end: int
    option: int
    """The mark of the first label."""
    edge: int
    """The mark of the first edge."""
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
    """Where a text is before each of its tokens, which in both texts says what comes next; each ``[rows, length]``."""

    mark: Tensor
    """The last mark: of an edge or a label, or the one that begins a text. Behind a label it is that of its value."""
    previous: Tensor
    """The token before; in a value its mark."""
    since: Tensor
    """Tokens since the mark, without soft ones."""


def contexts(tokens: Tensor, soft: Tensor, vocabulary: Vocabulary) -> Contexts:
    """The contexts of texts ``[rows, length]``. ``soft``: which of their columns are soft tokens, ``[length]``."""

    def among(first: int, count: int) -> Tensor:
        return (tokens >= first) & (tokens < first + count)

    def last(chosen: Tensor) -> Tensor:
        """The last column before each that is ``chosen``, -1 without one."""
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        found = torch.where(chosen, columns, -1).cummax(1).values
        return nn.functional.pad(found, (1, 0), value=-1)[:, :-1]

    edges = among(vocabulary.edge, EDGES)
    begins = ((tokens == vocabulary.read) | (tokens == vocabulary.write)) & ~soft
    marked = last(edges | begins | among(vocabulary.option, OPTIONS))
    after_label = last(tokens == vocabulary.label_end) > marked
    column = torch.where(after_label, last(edges), marked).clamp_min(0)
    count = (~soft).long().cumsum(0)
    since = (count - 1).expand_as(column) - count[column]
    since = torch.where(after_label, 1, since).clamp_min(0)
    tokens = tokens.masked_fill(tokens == vocabulary.write, vocabulary.read)
    mark = tokens.gather(1, column)
    previous = nn.functional.pad(tokens, (1, 0), value=vocabulary.read)[:, :-1]
    in_value = (mark >= vocabulary.edge) & (mark < vocabulary.edge + EDGES) & ((mark - vocabulary.edge) % 2 == 0)
    return Contexts(mark, torch.where(in_value, mark, previous), since)


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
    keys: list[int]
    """Columns of the first text with something to copy, none of them soft."""


def draw_copies(
    rng: random.Random, generator: torch.Generator, rows: int, vocabulary: Vocabulary, *, gaps: bool
) -> Copies:
    """Draw ``rows`` pairs. They have the same form, so that nothing is padded. ``gaps``: the first text has values in
    slots of soft tokens, some of them marks of labels; the second has the values, and labels behind their marks."""

    def token(number: int) -> Tensor:
        return torch.full((rows, 1), number)

    def words(count: int) -> Tensor:
        return torch.randint(vocabulary.word, vocabulary.size, (rows, count), generator=generator)

    size = rng.randint(0, 8) if gaps else 0
    options = len(vocabulary.contents) - vocabulary.characters
    chosen = torch.rand(rows, options, generator=generator).argsort(1)[:, :size] + vocabulary.characters
    separator = words(1 if rng.random() < 0.5 else 0)
    shown, written = _Text(words(0)), _Text(words(0))
    keys: list[int] = []
    names: list[Tensor] = []
    # In half of the texts all labels are made of the same few tokens.
    few = words(rng.randint(2, 6) if rng.random() < 0.5 else 0)
    for mark in vocabulary.contents[chosen].unsqueeze(2).unbind(1):
        length = rng.randint(1, rng.randint(1, _LONGEST_LABEL))
        names.append(words(length))
        if few.shape[1]:
            names[-1] = few.gather(1, torch.randint(few.shape[1], (rows, length), generator=generator))
        shown.add(mark)
        keys += range(shown.length, shown.length + length + 1)
        for part in (names[-1], token(vocabulary.label_end)):
            shown.add(part)
    shown.add(token(vocabulary.read))
    contents: list[Tensor] = []
    slots: list[int] = []
    soft: list[tuple[int, int]] = []
    slotted: list[tuple[int, int]] = []
    values = rng.randint(2, 8)
    # As in a text, edges have consecutive marks.
    edge = vocabulary.edge + 2 * torch.randint(EDGES // 2 - values + 1, (rows, 1), generator=generator)
    for place in range(values):
        literal = torch.cat([words(rng.randint(0, rng.randint(1, _LONGEST_LITERAL))), separator], 1)
        begin, end = edge + 2 * place, edge + 2 * place + 1
        for text in (shown, written):
            text.add(literal)
            text.add(begin)
        if gaps:
            if not slots or rng.random() < 0.2 or slots[-1] > SLOTS - 8:
                slots.append(0)
            soft.append((shown.length, len(slots) - 1))
            shown.add(token(vocabulary.read))
            if size and rng.random() < _LABELS:
                picked = rng.randrange(size)
                value, blanks = chosen[:, picked : picked + 1], 0
                for part in (vocabulary.contents[value], names[picked], token(vocabulary.label_end)):
                    written.add(part)
            else:
                count, blanks = rng.randint(1, 6), rng.randint(0, 2)
                value = torch.randint(1, vocabulary.characters, (rows, count), generator=generator)
                written.add(vocabulary.contents[value])
            value = nn.functional.pad(value, (0, blanks))
            first, count = vocabulary.slot + slots[-1], value.shape[1]
            slotted += [(shown.length + column, len(slots) - 1) for column in range(count)]
            shown.add(torch.arange(first, first + count).expand(rows, -1))
            slots[-1] += count
            contents.append(value)
        for text in (shown, written):
            text.add(end)
    literal = words(rng.randint(0, 4))
    for text in (shown, written):
        text.add(literal)
    keys += range(keys[-1] + 2 if keys else 1, shown.length + 1)
    shown.add(token(vocabulary.write))
    written.add(token(vocabulary.end))
    columns = {column for column, _ in soft}
    return Copies(
        before=shown.tokens,
        after=written.tokens,
        contents=torch.cat([words(0), *contents], 1),
        slots=slots,
        soft=soft,
        slotted=slotted,
        keys=[key for key in keys if key not in columns],
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

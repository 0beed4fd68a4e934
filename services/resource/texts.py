"""Descriptions of configurations: written from a template, and read back into values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ethogram.specs.resource import MAX_DIMENSIONS, MOST

SLOTS = 24
"""Characters that a soft token holds at most, for a model that was trained to read vectors."""
OPTIONS = 128
"""Labels of all fields at most, for such a model."""
PAD = "<pad>"
"""Token of such a model that stands for no text, and for an empty slot."""
READ, WRITE = "<|read|>", "<|write|>"
"""Marks before and after the layout that such a model is shown."""
LABEL_END = "<|label end|>"
"""Mark after each label, for such a model."""
EDGES = 2 * (MAX_DIMENSIONS + 1)
"""Marks of the edges of values, two for each field of a text."""
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_NUMBER = r"\d+(?:\.\d+)?"


class MalformedTemplate(ValueError):
    """A template that names an unknown field, or whose texts cannot be read back."""


def number_text(value: float, decimals: int) -> str:
    """A number as descriptions have it, rounded half to even."""
    return f"{value:.{decimals}f}"


def option(index: int) -> str:
    """The mark of a label, by its index among all labels of a template."""
    return f"<|option {index}|>"


def edge(index: int) -> str:
    """The mark of an edge of a value, by its index among all edges of a text: where a value begins it is even."""
    return f"<|edge {index}|>"


def slot(index: int) -> str:
    """The mark of a place for one character that a soft token holds."""
    return f"<|slot {index}|>"


@dataclass(frozen=True)
class Soft:
    """A soft token in a layout."""

    index: int


@dataclass(frozen=True)
class Slot:
    """A place in a layout for one character, or one label, of the soft token before it. What a model sees there is that
    soft token times the embedding of the slot's mark, which lets the slot's own dimensions through."""

    index: int


def slots(template: Template, tokens: int) -> list[int]:
    """Characters that each of ``tokens`` soft tokens holds."""
    return [sum(template.places[field] for field in group) for group in template.groups(tokens)]


@dataclass(frozen=True)
class Template:
    """A form of description. ``labels``: of each field, in the order of the vectors; empty for a number."""

    name: str
    text: str
    fields: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    decimals: tuple[int, ...]
    highest: tuple[float, ...]
    """Greatest value of each number that a reader has slots for; 0 for a category."""
    first_option: int = 0
    """Number of its first label's mark."""
    first_edge: int = 0
    """Number of the mark of its first value's beginning, which is even."""

    def __post_init__(self) -> None:
        names = self.names
        if unknown := [name for name in names if name not in self.fields]:
            raise MalformedTemplate(f"names the unknown field {unknown[0]}; there are {', '.join(self.fields)}")
        for field in self.fields:
            if names.count(field) != 1:
                raise MalformedTemplate(
                    f"must name {field} once, so that it can be read back, not {names.count(field)} times"
                )
        for before, literal, after in zip(names, self.literals[1:-1], names[1:], strict=False):
            if not literal:
                raise MalformedTemplate(f"cannot be read back: nothing stands between {before} and {after}")
        for name, before, after in zip(names, self.literals, self.literals[1:], strict=False):
            if not self.labels[self.fields.index(name)] and (re.search(r"[\d.]$", before) or re.match(r"\.?\d", after)):
                raise MalformedTemplate(f"cannot be read back: a digit stands beside the number {name}")

    @cached_property
    def names(self) -> list[str]:
        """Names of the fields, in the order of the text."""
        return _PLACEHOLDER.findall(self.text)

    @cached_property
    def literals(self) -> list[str]:
        """The text before, between and after the fields."""
        return _PLACEHOLDER.split(self.text)[::2]

    @cached_property
    def order(self) -> list[int]:
        """Indices of the fields, in the order of the text."""
        return [self.fields.index(name) for name in self.names]

    def value_text(self, index: int, value: float) -> str:
        """How the text has a field's value."""
        labels = self.labels[index]
        return labels[int(value)] if labels else number_text(value, self.decimals[index])

    def parts(self, values: Sequence[float], *, marked: bool = False) -> list[tuple[str, bool]]:
        """The text in parts, and whether each is the value of a field, not of the template. ``marked``: with the marks
        of edges and labels, which a model that was trained to read vectors writes and no text shows."""
        parts = [(self.literals[0], False)]
        for place, (index, literal) in enumerate(zip(self.order, self.literals[1:], strict=True)):
            texts = [self.value_text(index, values[index])]
            if marked and self.labels[index]:
                texts = [option(self.options[index] + int(values[index])), *texts, LABEL_END]
            begin, end = self._edges(place) if marked else ("", "")
            parts += [(begin, False), *((text, True) for text in texts), (end, False), (literal, False)]
        return [part for part in parts if part[0]]

    def _edges(self, place: int) -> tuple[str, str]:
        """The marks before and after the value of some place in the text."""
        first = self.first_edge + 2 * place
        return edge(first), edge(first + 1)

    def longest(self, *, marked: bool = False) -> list[tuple[str, bool]]:
        """The :meth:`parts` of a description as long as one can be."""
        values = []
        for labels in self.labels:
            values.append(float(labels.index(max(labels, key=len))) if labels else float(MOST))
        return self.parts(values, marked=marked)

    def write(self, values: Sequence[float]) -> str:
        """The description of a configuration: a value of each field, of categories the index of its label."""
        return "".join(text for text, _ in self.parts(values))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.literals[0])
        for index, literal in zip(self.order, self.literals[1:], strict=True):
            # The longest first, since one label may begin another.
            labels = sorted(self.labels[index], key=len, reverse=True)
            pattern += f"({'|'.join(map(re.escape, labels)) or _NUMBER}){re.escape(literal)}"
        return re.compile(pattern)

    def read(self, text: str) -> list[float] | None:
        """The values that a description has; None for any other text."""
        match = self._pattern.fullmatch(text)
        if match is None:
            return None
        values = [0.0] * len(self.fields)
        for index, found in zip(self.order, match.groups(), strict=True):
            labels = self.labels[index]
            values[index] = labels.index(found) if labels else float(found)
        return values

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Characters of the longest value of each field; a label counts as one."""
        pairs = zip(self.highest, self.decimals, self.labels, strict=True)
        return tuple(1 if labels else len(number_text(most, decimals)) for most, decimals, labels in pairs)

    @cached_property
    def options(self) -> tuple[int, ...]:
        """Number of the mark of each field's first label."""
        return tuple(itertools.accumulate(map(len, self.labels[:-1]), initial=self.first_option))

    def groups(self, tokens: int) -> list[list[int]]:
        """Which fields each of ``tokens`` soft tokens holds: in order, about as many places each."""
        total, groups, before = sum(self.places), [list[int]() for _ in range(tokens)], 0
        for index, places in enumerate(self.places):
            groups[min(tokens - 1, (2 * before + places) * tokens // (2 * total))].append(index)
            before += places
        return groups

    def first_slots(self, tokens: int) -> list[tuple[int, int]]:
        """Where each field is in ``tokens`` soft tokens: which of them, and its first slot in that."""
        found = [(0, 0)] * len(self.fields)
        for number, group in enumerate(self.groups(tokens)):
            taken = 0
            for index in group:
                found[index] = number, taken
                taken += self.places[index]
        return found

    def layout(self, tokens: int) -> list[str | Soft | Slot]:
        """What a model that was trained to read vectors sees before it writes: the template, in which each field has
        its soft token and the slots of its characters in that, between the marks of its edges."""
        first_slots = self.first_slots(tokens)
        cells: list[str | Soft | Slot] = [READ, self.literals[0]]
        for place, (index, literal) in enumerate(zip(self.order, self.literals[1:], strict=True)):
            (number, first), (begin, end) = first_slots[index], self._edges(place)
            held = [Slot(first + step) for step in range(self.places[index])]
            cells += [begin, Soft(number), *held, end, literal]
        return [cell for cell in [*cells, WRITE] if cell != ""]

    def contents(self, values: Sequence[float]) -> list[list[str]]:
        """What is in the slots of each field of a vector: characters from the left, and empty texts where the value is
        shorter; or the mark of the label."""
        rows = []
        for index, (value, places) in enumerate(zip(values, self.places, strict=True)):
            if self.labels[index]:
                rows.append([option(self.options[index] + int(value))])
            else:
                found = list(self.value_text(index, value))[:places]
                rows.append(found + [""] * (places - len(found)))
        return rows

    @cached_property
    def legend(self) -> list[str]:
        """What such a model is told first: each label behind its mark, and the mark that ends it."""
        labels = enumerate(itertools.chain(*self.labels), self.first_option)
        return [text for number, label in labels for text in (option(number), label, LABEL_END)]

    @cached_property
    def prompt(self) -> str:
        """What any other language model is shown before the vector: the labels of each category, and the template."""
        pairs = zip(self.fields, self.labels, strict=True)
        lines = [f"{name}: {', '.join(labels)}" for name, labels in pairs if labels]
        return "\n".join([*lines, self.text, ""])

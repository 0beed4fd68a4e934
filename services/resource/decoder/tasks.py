"""Texts of tasks: requirements in words that determine a tool and one of its configurations."""

from __future__ import annotations

import random
import re
from typing import Any

from ethogram.errors import InvalidInput
from services.resource.corpus import words
from services.resource.decoder.model import split
from services.resource.export import TOOL_NAME, Export

_ONES = words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen")
_TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety"}
_OPENINGS = (
    "I need {tool}",
    "Set up {tool}",
    "Please run {tool} for me",
    "The job is {tool}",
    "We want {tool} in production",
    "Looking for a way to do {tool}",
)
_NUMBERS = (
    "with {value} {unit}{name}",
    "{name} of {value} {unit}",
    "give it {value} {unit}{name}",
    "{value} {unit}{name}",
)
_LABELS = ("{value} {name}", "the {name} is {value}", "{name}: {value}", "for {value} {name}")


class TaskTexts:
    """Draws texts for the configurations of an export.

    Measured dimensions are not mentioned: a user cannot ask for them and for a configuration at once.
    """

    def __init__(self, export: Export) -> None:
        """Raises :class:`InvalidInput` for an export whose configurations no text tells apart: with repeated
        measurements, or with tools or labels that differ only in their case or in what stands between words."""
        if export.schema.spec.repeated:
            raise InvalidInput.field("export", "has repeated measurements of a configuration; no text tells them apart")
        self.rows = [export.lookup[str(index)] for index in range(len(export.lookup))]
        self.tools = export.schema.tools
        """Names of the tools, by index."""
        dimensions = export.schema.dimensions[1:]
        self.units = {dimension.name: dimension.unit for dimension in dimensions}
        for dimension in export.schema.dimensions:
            told: dict[tuple[str, ...], str] = {}
            for label in dimension.labels:
                if (other := told.setdefault(tuple(split(spaced(label))), label)) != label:
                    text = f"has {other!r} and {label!r} in {dimension.name}; no text tells them apart"
                    raise InvalidInput.field("export", text)
        self.chosen = [dimension.name for dimension in dimensions if not dimension.measured]

    def words(self) -> list[str]:
        """All words, digits and marks of texts, in order."""
        values = {spaced(value) for row in self.rows for value in row.values() if isinstance(value, str)}
        names = {spaced(name) for name in self.chosen} | {*self.units.values()}
        texts = [*_OPENINGS, *_NUMBERS, *_LABELS, *map(spelled, range(100)), *values, *names, "0123456789.,-+ and"]
        return sorted({word for text in texts for word in split(text)})

    def draw(self, configuration: int, rng: random.Random) -> str:
        """A text for the configuration with this id."""
        row = self.rows[configuration]
        phrases = [self._phrase(name, row[name], rng) for name in self.chosen]
        rng.shuffle(phrases)
        opening = rng.choice(_OPENINGS).format(tool=spaced(str(row[TOOL_NAME])))
        listed = [", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases
        return f"{', '.join([opening, *listed[:1]])}{' and ' if len(listed) > 1 else ''}{''.join(listed[1:])}."

    def _phrase(self, name: str, value: Any, rng: random.Random) -> str:
        if isinstance(value, str):
            return rng.choice(_LABELS).format(value=spaced(value), name=spaced(name))
        unit = self.units.get(name, "")
        # All digits: a number has up to seven, and three decimals.
        text = f"{value:.10g}"
        if float(value).is_integer() and 0 <= value < 100 and rng.random() < 0.3:
            text = spelled(int(value))
        # The name may have the unit at its end, e.g. memory_gb.
        plain = spaced(re.sub(rf"_{re.escape(unit.lower())}$", "", name)) if unit else spaced(name)
        return (
            rng.choice(_NUMBERS)
            .format(value=text, unit=f"{unit} " if unit else "", name=plain)
            .replace("  ", " ")
            .strip()
        )


def spaced(name: str) -> str:
    """A name as words."""
    return name.replace("_", " ")


def spelled(number: int) -> str:
    """A whole number below 100 in words."""
    if number < len(_ONES):
        return _ONES[number]
    if number < 20:
        return _ONES[number - 10].rstrip("t") + "teen"
    ones = number % 10
    return _TENS[number - ones] + (f"-{_ONES[ones]}" if ones else "")

"""Random schemas, on which the default language model learns to read vectors: names, templates and values.

Words are of computing and of no subject at all, and half of the names are made up, so that a model learns to copy what
a prompt says and not what a certain table has. Some schemas have few words, so that their names begin and end alike, as
those of memory and GPU memory do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ethogram.specs.resource import FINEST, MOST
from services.resource.texts import EDGES, OPTIONS, SLOTS, Template, slots


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


_WORDS = words("""
accuracy adapter agent array audio average balance band base batch beam bit block board box branch buffer bus
byte cache camera capacity card cell channel chip class clock cloud cluster code command compute connection container
context control copy core cost count crop current cycle data deadline decode delay density depth device disk distance
domain download drive edge encode energy engine error estimate expert factor fan feature file filter flow format frame
frequency gain gateway graph grid group heat height host image index input instance interval item job kernel key
language latency layer learning length level light limit line link load lock loop loss machine map mass mean medium
memory message method mode model motor network node noise number object offset operator order output packet page pair
part path peak period phase pipeline pixel plan point policy pool port power precision pressure price process profile
prompt quality query queue rack radius range rank rate ratio read record region replica request resolution resource
response ring robot room rotor route row run sample scale scene score screen search second segment sensor sequence
server service session shape shard signal size slot socket source space speech speed stage state step storage stream
summary supply switch table target task temperature tensor test text thread throughput tier time token tool torque
train transfer translation type unit update usage user value vector version video voltage volume wait water wave weight
width window worker write zone""")
_UNITS = words("ms s us GB MB KB MHz GHz W kW J % K C m mm kg g V A Hz rpm bar MB/s req/s tokens steps nodes cores")
_ADJECTIVES = words("""
small medium large tiny huge low high fast slow cold hot old new light heavy short long fp16 int8
float32 bfloat16 first second third none on off""")
_FILLERS = words("""
to run use with on for give it take takes needs a an the of in at under about by from uses set has have
when where this one configuration costs asks then""")
_ONSETS = words("b c d f g h k l m n p r s t v w z br cl dr fl gr pl sh st th tr")
_RIMES = [vowel + end for vowel in ("a", "e", "i", "o", "u", "ai", "ea", "oo") for end in ("", "n", "r", "s", "l", "t")]
_FEW_WORDS = 0.4
"""Share of the schemas with few words."""
_JOINTS = ("_", "_", " ", "-", "/", ".")
Sampler = Callable[[random.Random], float]


@dataclass(frozen=True)
class RandomSchema:
    """A table that nobody measured: a tool and some dimensions, with one template."""

    template: Template
    samplers: tuple[Sampler, ...]
    tokens: int
    """Soft tokens of its vectors."""

    def row(self, rng: random.Random) -> list[float]:
        """A configuration."""
        return [sampler(rng) for sampler in self.samplers]


def random_schema(rng: random.Random, count: int, most_labels: int, *, bare: bool) -> RandomSchema:
    """Draw a schema of ``count`` fields, with at most ``most_labels`` for each. ``bare``: its template has hardly more
    than the values."""
    few = [_word(rng) for _ in range(rng.randint(3, 6))] if rng.random() < _FEW_WORDS else []
    labels: list[tuple[str, ...]] = [_distinct(rng, lambda: _name(rng, 3, few), rng.randint(1, most_labels))]
    decimals = [0]
    for _ in range(count - 1):
        category = rng.random() < 0.2
        size = min(rng.choice((2, 3, 3, 4, 6, most_labels)), most_labels, OPTIONS - sum(map(len, labels)))
        labels.append(_distinct(rng, lambda: _label(rng, few), size) if category else ())
        decimals.append(0 if category else rng.choice((0, 0, 0, 1, 2, FINEST)))
    names = ("tool", *(f"field{index}" for index in range(1, count)))
    text = _bare(rng, names) if bare else _template(rng, names, labels, few)
    pairs = [_sampler(rng, options, places) for options, places in zip(labels, decimals, strict=True)]
    highest, samplers = zip(*pairs, strict=True)
    first = rng.randrange(OPTIONS - sum(map(len, labels)) + 1)
    edge = 2 * rng.randrange(EDGES // 2 - count + 1)
    template = Template("random", text, names, tuple(labels), tuple(decimals), highest, first, edge)
    # A soft token has so many slots.
    enough = [tokens for tokens in (1, 2, 4, 8) if max(slots(template, tokens)) <= SLOTS]
    if not enough:
        return random_schema(rng, count, most_labels, bare=bare)
    return RandomSchema(template, samplers, max(enough[0], rng.choice((1, 1, 1, 2, 4, 8))))


def _distinct(rng: random.Random, draw: Callable[[], str], count: int) -> tuple[str, ...]:
    return tuple(dict.fromkeys(draw() for _ in range(count)))


def _word(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(_WORDS)
    return "".join(rng.choice(_ONSETS) + rng.choice(_RIMES) for _ in range(rng.randint(1, 3)))


def _name(rng: random.Random, most: int, few: list[str]) -> str:
    words = [rng.choice(few) if few else _word(rng) for _ in range(rng.randint(1, most))]
    if rng.random() < 0.15:
        words.append(str(rng.randint(0, 999)))
    if rng.random() < 0.1:
        words = [word.capitalize() for word in words]
    if rng.random() < 0.05:
        words = [word.upper() for word in words]
    return rng.choice(_JOINTS).join(words)


def _label(rng: random.Random, few: list[str]) -> str:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(_ADJECTIVES)
    if kind < 0.45:
        return rng.choice("ABCDHLTV") + str(rng.choice((4, 10, 40, 90, 100, 200, 300)))
    if kind < 0.55:
        return f"{_word(rng).capitalize()}-{rng.randint(1, 99)}{rng.choice(('B', 'b', 'M', ''))}"
    return _name(rng, 2, few)


def _bare(rng: random.Random, names: tuple[str, ...]) -> str:
    order = list(names)
    if rng.random() < 0.7:
        rng.shuffle(order)
    return rng.choice((" ", ", ", "; ", " | ")).join(f"{{{name}}}" for name in order)


def _template(rng: random.Random, names: tuple[str, ...], labels: list[tuple[str, ...]], few: list[str]) -> str:
    order = list(range(len(names)))
    if rng.random() < 0.7:
        rng.shuffle(order)
    style, between = rng.random(), rng.choice((" ", ": ", "=", " = ", " is ", " of "))
    parts = []
    for index in order:
        name, unit = _name(rng, 2, few).replace("_", rng.choice((" ", "_"))), rng.choice(_UNITS)
        value = f"{{{names[index]}}}"
        # One style throughout, or another for each field.
        form = rng.random() if style < 0.5 else style
        if form < 0.3:
            parts.append(f"{name}{between}{value}" + (f" {unit}" if rng.random() < 0.5 and not labels[index] else ""))
        elif form < 0.6:
            parts.append(f"{value} {unit} of {name}" if rng.random() < 0.5 else f"{value} {name}")
        elif form < 0.8:
            parts.append(f"{name[:4]} {value}")
        else:
            words = " ".join(rng.choice(_FILLERS) for _ in range(rng.randint(1, 3)))
            parts.append(f"{words} {value} {rng.choice((name, unit))}")
    text = rng.choice((", ", "; ", " and ", " | ", " ", ", with ")).join(parts)
    if rng.random() < 0.4:
        words = " ".join(rng.choice((*_FILLERS, *_WORDS[:40])) for _ in range(rng.randint(1, 3)))
        text = words + rng.choice((" ", ": ")) + text
    if rng.random() < 0.3 and not text.startswith("{"):
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.5 else "")


def _sampler(rng: random.Random, labels: tuple[str, ...], decimals: int) -> tuple[float, Sampler]:
    """The greatest value of a field, and how its values are drawn: labels, a few levels, or numbers of any size."""
    if labels:
        return 0.0, lambda rng: float(rng.randrange(len(labels)))
    kind = rng.random()
    if kind < 0.5:
        base = rng.choice((1, 2, 4, 5, 8, 10, 16, 20, 100))
        steps = rng.choice(((1, 2, 4), (1, 2, 3), (1, 2, 4, 8, 16), (1, 2, 5, 10), tuple(range(1, 11))))
        return _slack(rng, base * max(steps)), lambda rng: float(base * rng.choice(steps))
    if kind < 0.9:
        low, high = rng.uniform(-decimals, 1), rng.uniform(1.5, 7 - decimals / 2)
        return _slack(rng, 10**high), lambda rng: min(float(MOST), round(10 ** rng.uniform(low, high), decimals))
    most = rng.choice((10, 100, 1000, 10_000))
    return _slack(rng, most), lambda rng: round(rng.uniform(0, most), decimals)


def _slack(rng: random.Random, most: float) -> float:
    """A greatest value that a reader may have been told: up to twice the one that there is."""
    return min(float(MOST), most * rng.choice((1, 2)))

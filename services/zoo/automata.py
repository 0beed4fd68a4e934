"""Regular sets of sequences: regular expressions over letters, exact counts and uniform draws."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_STATES = 2000
_MAX_REPEATS = 100
# Letters of an expression with all its repeats written out.
_MAX_LETTERS = 500

# Minimum and maximum repeats.
_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}

# A regular expression is a term: ("none",), ("empty",), ("letter", letters), ("then", a, b), ("or", terms) or
# ("many", a).
Term = tuple[Any, ...]
NONE: Term = ("none",)
EMPTY: Term = ("empty",)


class Automaton(NamedTuple):
    """A deterministic automaton over all 26 letters; state 0 is the start."""

    step: Tensor
    """The state after each state and letter: int64 ``[states, 26]``."""
    accepting: Tensor
    """bool ``[states]``."""

    def matches(self, sequences: Tensor) -> Tensor:
        """Whether each row of letter indices ``[n, length]`` is accepted: bool ``[n]``."""
        step, state = self.step.to(sequences.device), torch.zeros_like(sequences[:, 0], dtype=torch.int64)
        for column in sequences.long().unbind(1):
            state = step[state, column]
        return self.accepting.to(sequences.device)[state]


class Members:
    """Counts and draws the sequences of ``length`` letters, of the first ``vocab_size``, that an automaton accepts.

    A sequence is drawn letter by letter, each letter weighted by the number of accepted completions."""

    def __init__(self, automaton: Automaton, vocab_size: int, length: int) -> None:
        self._step = automaton.step[:, :vocab_size]
        step = self._step.tolist()
        # ways[left][state]: accepted completions of ``left`` letters.
        ways: list[list[int]] = [automaton.accepting.long().tolist()]
        for _ in range(length):
            ways.append([sum(ways[-1][successor] for successor in row) for row in step])
        self.total = ways[length][0]
        """Exact number of accepted sequences."""
        # Ratios of exact integers: sampling needs no more.
        self._weights = torch.tensor(
            [
                [[ways[left][after] / max(ways[left + 1][state], 1) for after in row] for state, row in enumerate(step)]
                for left in reversed(range(length))
            ],
            dtype=torch.float64,
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` independent uniform members: int64 ``[n, length]``."""
        state, columns = torch.zeros(n, dtype=torch.int64), []
        for weights in self._weights:
            letter = torch.multinomial(weights[state], 1, generator=generator).squeeze(1)
            columns.append(letter)
            state = self._step[state, letter]
        return torch.stack(columns, 1)


@cache
def compiled(expression: str) -> Automaton:
    """The automaton of a regular expression, by derivatives (Brzozowski 1964). It must match a whole sequence.

    Letters A to Z, ``.``, ``[AB]``, ``[A-C]``, ``[^A]``, ``(...)``, ``|``, ``*``, ``+``, ``?``, ``{3}``, ``{2,}``,
    ``{2,4}``, and ``(?:...)``. As it matches whole sequences, ``^`` and ``$`` at the ends change nothing. Raises
    :class:`InvalidInput` naming ``regex`` and the position of a mistake.
    """
    try:
        return _automaton(_Parser(expression).parse())
    except RecursionError:
        raise InvalidInput.field("regex", "is too long or nested too deeply; make it simpler") from None


def _automaton(start: Term) -> Automaton:
    numbers, states, rows = {start: 0}, [start], list[tuple[int, ...]]()
    # The list grows while it is gone through: breadth first.
    for state in states:
        successors = [_derivative(state, letter) for letter in range(len(LETTERS))]
        for successor in successors:
            if successor not in numbers:
                if len(states) == MAX_STATES:
                    raise InvalidInput.field("regex", f"needs more than {MAX_STATES} states; make it simpler")
                numbers[successor] = len(states)
                states.append(successor)
        rows.append(tuple(numbers[successor] for successor in successors))
    return Automaton(torch.tensor(rows), torch.tensor([_nullable(state) for state in states]))


def _count_letters(term: Term) -> int:
    """Letters of a term with all its repeats written out."""
    if term[0] == "letter":
        return 1
    return sum(map(_count_letters, term[1] if term[0] == "or" else term[1:]))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> Term:
        term = self._either(anchored=True)
        self._limit(_count_letters(term))
        if self._at < len(self._text):
            raise self._error("has no opening parenthesis" if self._next == ")" else "is not allowed here")
        return term

    @property
    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _error(self, what: str) -> InvalidInput:
        position = f"{self._next!r} at character {self._at + 1}" if self._next else "the end"
        if self._next and self._next in "^$":
            what = "is allowed at the ends alone: patterns match whole sequences; leave out ^ and $"
        return InvalidInput.field("regex", f"{position} {what}")

    def _take(self, text: str) -> bool:
        matches = self._next == text
        self._at += matches
        return matches

    def _either(self, *, anchored: bool = False) -> Term:
        """Alternatives; those of the whole expression may be ``anchored``."""
        terms = list[Term]()
        while not terms or self._take("|"):
            if anchored:
                self._take("^")
            terms.append(self._sequence())
            if anchored and self._text[self._at + 1 : self._at + 2] in ("", "|"):
                self._take("$")
        return _or(terms)

    def _sequence(self) -> Term:
        term = EMPTY
        while self._next and self._next not in "|)$":
            term = _then(term, self._repeated())
        return term

    def _repeated(self) -> Term:
        term = self._atom()
        while self._next and self._next in "*+?{":
            least, most = self._bounds()
            self._limit(_count_letters(term) * max(least + (most is None), most or 0))
            repeats = [term] * least + ([_many(term)] if most is None else [_or([EMPTY, term])] * (most - least))
            term = reduce(_then, repeats, EMPTY)
        return term

    def _limit(self, letters: int) -> None:
        if letters > _MAX_LETTERS:
            text = f"has {letters} letters with its repeats written out, more than {_MAX_LETTERS}; make it simpler"
            raise InvalidInput.field("regex", text)

    def _bounds(self) -> tuple[int, int | None]:
        quantifier = self._next
        self._at += 1
        if quantifier in _QUANTIFIERS:
            return _QUANTIFIERS[quantifier]
        least = self._number()
        most: int | None = least
        if self._take(","):
            most = None if self._next == "}" else self._number()
        if not self._take("}"):
            raise self._error("should be }")
        if most is not None and most < least:
            raise InvalidInput.field("regex", f"{{{least},{most}}} has its numbers the wrong way round")
        return least, most

    def _number(self) -> int:
        start = self._at
        while self._next.isdigit():
            self._at += 1
        if start == self._at:
            raise self._error("should be a number")
        value = int(self._text[start : self._at])
        if value > _MAX_REPEATS:
            raise InvalidInput.field("regex", f"repeats more than {_MAX_REPEATS} times")
        return value

    def _atom(self) -> Term:
        if self._take("("):
            if self._text.startswith("?:", self._at):
                self._at += 2
            term = self._either()
            if not self._take(")"):
                raise self._error("should be )")
            return term
        if self._take("."):
            return _letter(range(len(LETTERS)))
        if self._take("["):
            return self._set()
        return _letter([self._index()])

    def _set(self) -> Term:
        negated, letters = self._take("^"), set[int]()
        while not self._take("]"):
            first = last = self._index()
            if self._take("-"):
                last = self._index()
            if last < first:
                raise InvalidInput.field("regex", f"[{LETTERS[first]}-{LETTERS[last]}] is the wrong way round")
            letters |= set(range(first, last + 1))
        return _letter(set(range(len(LETTERS))) - letters if negated else letters)

    def _index(self) -> int:
        if not self._next or self._next not in LETTERS:
            raise self._error("should be a letter A to Z")
        self._at += 1
        return LETTERS.index(self._text[self._at - 1])


def _letter(letters: Iterable[int]) -> Term:
    """One letter out of ``letters``."""
    return ("letter", frozenset(letters)) if letters else NONE


def _then(a: Term, b: Term) -> Term:
    if NONE in (a, b):
        return NONE
    if a == EMPTY:
        return b
    return a if b == EMPTY else ("then", a, b)


def _or(terms: list[Term]) -> Term:
    flat: set[Term] = set()
    for term in terms:
        flat |= term[1] if term[0] == "or" else {term}
    flat.discard(NONE)
    if not flat:
        return NONE
    return flat.pop() if len(flat) == 1 else ("or", frozenset(flat))


def _many(term: Term) -> Term:
    if term in (NONE, EMPTY):
        return EMPTY
    return term if term[0] == "many" else ("many", term)


@cache
def _nullable(term: Term) -> bool:
    match term:
        case ("empty",) | ("many", _):
            return True
        case ("then", a, b):
            return _nullable(a) and _nullable(b)
        case ("or", terms):
            return any(map(_nullable, terms))
    return False


@cache
def _derivative(term: Term, letter: int) -> Term:
    """The sequences that may follow ``letter`` (Brzozowski's derivative)."""
    match term:
        case ("letter", letters):
            return EMPTY if letter in letters else NONE
        case ("then", a, b):
            first = _then(_derivative(a, letter), b)
            return _or([first, _derivative(b, letter)]) if _nullable(a) else first
        case ("or", terms):
            return _or([_derivative(alternative, letter) for alternative in terms])
        case ("many", a):
            return _then(_derivative(a, letter), term)
    return NONE

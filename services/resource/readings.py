"""Whether the descriptions of a template can be read in one way only.

A template is an automaton that accepts its descriptions character by character. It is ambiguous if two different paths
accept the same text, which a search over pairs of states finds (Weber & Seidl 1991).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

from services.resource.texts import Template

State = tuple[int, str]
"""A part of the template, literal or value, and what has been read of it."""
_NUMBER = {"": {digit: "0" for digit in "0123456789"}}
_NUMBER |= {"0": _NUMBER[""] | {".": "0."}, "0.": {digit: "0.0" for digit in "0123456789"}}
_NUMBER["0.0"] = _NUMBER["0."]
"""What follows in a number: one digit stands for any number of them."""


def read_two_ways(template: Template) -> str | None:
    """A text that is a description of two different configurations; None: there is none."""
    automaton = _Automaton(template)
    start = ((0, ""), (0, ""))
    came_from: dict[tuple[State, State], tuple[tuple[State, State], str] | None] = {start: None}
    queue = deque([start])
    while queue:
        pair = queue.popleft()
        first, second = pair
        if first != second and automaton.ends(first) and automaton.ends(second):
            return _text(came_from, pair)
        following = defaultdict[str, list[State]](list)
        for character, state in automaton.moves(second):
            following[character].append(state)
        for character, one in automaton.moves(first):
            for other in following[character]:
                if one == other and first != second:
                    return _text(came_from, pair) + character + automaton.rest(one)
                reached = (one, other) if one <= other else (other, one)
                if reached not in came_from:
                    came_from[reached] = pair, character
                    queue.append(reached)
    return None


def _text(
    came_from: dict[tuple[State, State], tuple[tuple[State, State], str] | None], pair: tuple[State, State]
) -> str:
    """The characters on the way to a pair of states."""
    characters = []
    while (before := came_from[pair]) is not None:
        pair, character = before
        characters.append(character)
    return "".join(reversed(characters))


class _Automaton:
    def __init__(self, template: Template) -> None:
        self.options: list[Sequence[str] | None] = [[template.literals[0]]]
        """The texts that each part may be; None: a number."""
        for index, literal in zip(template.order, template.literals[1:], strict=True):
            self.options += [template.labels[index] or None, [literal]]
        self.following = [self._following(options) for options in self.options]

    def _following(self, options: Sequence[str] | None) -> dict[str, dict[str, str]]:
        """What is read with the next character, by what has been read."""
        if options is None:
            return _NUMBER
        following = defaultdict[str, dict[str, str]](dict)
        for option in options:
            for place, character in enumerate(option):
                following[option[:place]][character] = option[: place + 1]
        return following

    def complete(self, state: State) -> bool:
        """Whether the part may end here."""
        options = self.options[state[0]]
        return state[1] in (("0", "0.0") if options is None else options)

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        """The next characters, and where they lead."""
        while True:
            part, read = state
            for character, text in self.following[part].get(read, {}).items():
                yield character, (part, text)
            if not self.complete(state) or part + 1 == len(self.options):
                return
            state = part + 1, ""

    def ends(self, state: State) -> bool:
        """Whether the text may end here."""
        while self.complete(state):
            if state[0] + 1 == len(self.options):
                return True
            state = state[0] + 1, ""
        return False

    def rest(self, state: State) -> str:
        """One way to go on to the end."""
        characters = []
        while not self.ends(state):
            if self.complete(state):
                state = state[0] + 1, ""
            else:
                character, state = next(self.moves(state))
                characters.append(character)
        return "".join(characters)

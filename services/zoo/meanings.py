"""What the names of patterns in records from elsewhere mean."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.generation import BUILT_IN, GenerationSpec, PatternSpec
from services.runtime.reading import reading
from services.runtime.run import Run
from services.zoo.automata import LETTERS
from services.zoo.dataset import BASELINE, read_probes
from services.zoo.patterns import TAKES_TOKEN, from_specs, membership

PATTERNS = "patterns.json"
"""File beside the records that defines their patterns' names."""
_NAME = re.compile(r"(\w+)(?:\(([A-Z])\))?")


def patterns_in(value: Any, location: str) -> list[PatternSpec]:
    """The patterns of ``{"patterns": [...]}``, as in a spec; ``location`` is for error messages."""
    try:
        return [PatternSpec.model_validate(pattern) for pattern in value["patterns"]]
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, location) from None
    except (KeyError, TypeError):
        raise InvalidInput.field(location, 'must be {"patterns": [...]}, as in a spec') from None


def named(pattern: PatternSpec) -> str:
    """The name of a pattern in a zoo, e.g. ``starts_with(A)``."""
    return pattern.name if pattern.token is None else f"{pattern.name}({pattern.token})"


def defined(names: Mapping[str, str], patterns: Sequence[PatternSpec]) -> dict[str, PatternSpec]:
    """Which of ``patterns`` each name is; ``starts_with`` alone is enough if there is one such pattern. ``names``: each
    name's location in the records, for error messages."""
    kinds = Counter(pattern.name for pattern in patterns)
    known = {pattern.name: pattern for pattern in patterns if kinds[pattern.name] == 1}
    known |= {named(pattern): pattern for pattern in patterns}
    for name, location in names.items():
        if name not in known:
            raise InvalidInput.field(location, f"{name} is none of the patterns: {', '.join(map(named, patterns))}")
    return {name: known[name] for name in names}


def undefined(
    names: Mapping[str, str], spec: GenerationSpec, folder: Path, rename: Mapping[str, str], run: Run
) -> dict[str, PatternSpec]:
    """What each name means where nothing defines it: the built-in pattern of the name or, where that was another set
    in earlier work, that set, unless sequences in ``folder`` that are labelled with the name tell otherwise. The run's
    log says which.

    ``spec``: for its vocabulary and length; ``rename``: names in the labels to ``names``. Raises :class:`InvalidInput`
    for a name that stands for no pattern, and where the labelled sequences agree with neither meaning.
    """
    meanings = {name: _built_in(name, location) for name, location in names.items()}
    earlier = {name: pattern for name, pattern in _earlier(spec.vocab_size).items() if name in names}
    how = f"a {PATTERNS} beside the records, or --file, says what else the names mean"
    labels = _labels(folder, spec, rename) if earlier and (folder / BASELINE).exists() else None
    names_in_labels = set().union(*labels[1]) if labels is not None else set()
    labelled = {name: pattern for name, pattern in earlier.items() if name in names_in_labels}
    if len(labelled) < len(earlier):
        unlabelled = {name: pattern for name, pattern in earlier.items() if name not in labelled}
        run.log(f"as in earlier work {_listed(unlabelled)}; {how}", "warning")
    if labels is None or not labelled:
        return meanings | earlier
    current = {name: meanings[name] for name in labelled}
    fits = {"earlier": _fit(labelled, spec, *labels), "current": _fit(current, spec, *labels)}
    if fits["earlier"] is None and fits["current"] is None:
        text = f"has labels of {', '.join(labelled)} that are neither the built-in patterns nor, as in earlier work, "
        raise InvalidInput.field(BASELINE, f"{text}{', '.join(pattern.name for pattern in labelled.values())}; {how}")
    # Labels that fit both may name one pattern only of a sequence that matches several: what they leave out says
    # something where some name several, and lack none.
    complete = any(len(names) > 1 for names in labels[1]) and _fit(meanings, spec, *labels) == 0
    if fits["earlier"] is None or (complete and fits["earlier"] != 0):
        run.log(f"{', '.join(labelled)} are the built-in patterns: the labels in {BASELINE} agree; {how}")
        return meanings | earlier | current
    if fits["current"] is None:
        run.log(f"as in earlier work {_listed(labelled)}: the labels in {BASELINE} agree; {how}")
    else:
        both = f"the labels in {BASELINE} agree with that and with the built-in patterns"
        run.log(f"as in earlier work {_listed(labelled)}: {both}; {how}", "warning")
    return meanings | earlier


def _listed(meanings: Mapping[str, PatternSpec]) -> str:
    return ", ".join(f"{name} means {pattern.name}" for name, pattern in meanings.items())


def _built_in(name: str, location: str) -> PatternSpec:
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in BUILT_IN or (match[1] in TAKES_TOKEN) != bool(match[2]):
        text = f"{name} is not a built-in pattern; define it with patterns"
        raise InvalidInput.field(location, text)
    return PatternSpec(name=match[1], token=match[2])


def _earlier(vocab_size: int) -> dict[str, PatternSpec]:
    """What names meant in earlier work, where that was another set than the built-in pattern of the name.

    Pairs were of all neighbours, and equal ones counted, so that these were the sorted sequences; a mountain rose to a
    peak and fell from it, neither strictly, and the peak could be at an end.
    """
    letters = [f"{letter}*" for letter in LETTERS[:vocab_size]]
    return {
        "increasing_pairs": PatternSpec(name="sorted_ascending"),
        "decreasing_pairs": PatternSpec(name="sorted_descending"),
        "mountain_pattern": PatternSpec(
            name="earlier_mountain_pattern", regex="".join([*letters, *reversed(letters[:-1])])
        ),
    }


def _labels(
    folder: Path, spec: GenerationSpec, rename: Mapping[str, str]
) -> tuple[torch.Tensor, list[set[str]]] | None:
    """The labelled sequences in ``folder`` and the names at each, if there are any."""
    probes = read_probes(folder, spec)
    with reading(folder, BASELINE, "dataset") as path:
        labels = [row.get("patterns") for row in json.loads(path.read_bytes())["sequences"]]
    rows = [i for i, names in enumerate(labels) if isinstance(names, list)]
    return (probes[rows], [{rename.get(str(name), str(name)) for name in labels[i]} for i in rows]) if rows else None


def _fit(
    meanings: Mapping[str, PatternSpec], spec: GenerationSpec, sequences: torch.Tensor, labels: Iterable[set[str]]
) -> int | None:
    """How many labels the sequences lack if the names have these ``meanings``; None if a label is wrong then."""
    labelled = torch.tensor([[name in names for name in meanings] for names in labels])
    matches = torch.cat(
        [
            membership(from_specs([pattern], spec.vocab_size, spec.sequence_length), sequences)
            for pattern in meanings.values()
        ],
        1,
    )
    return None if bool((labelled & ~matches).any()) else int((matches & ~labelled).sum())

"""What the names of patterns in records from elsewhere mean."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.errors import InvalidInput
from ethogram.specs.generation import PatternSpec
from services.zoo.automata import LETTERS
from services.zoo.json_records import JsonRecords
from services.zoo.source import open_zoo
from tests.generation.test_json_form import published
from tests.recorder import Recorder

V, LENGTH = 10, 5
EVERY = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
Letters = tuple[int, ...]


def rises(letters: Letters) -> bool:
    return all(a <= b for a, b in itertools.pairwise(letters))


def falls(letters: Letters) -> bool:
    return all(a >= b for a, b in itertools.pairwise(letters))


def peaks(letters: Letters) -> bool:
    peak = letters.index(max(letters))
    return rises(letters[: peak + 1]) and falls(letters[peak:])


EARLIER: dict[str, Callable[[Letters], bool]] = {
    "increasing_pairs": rises,
    "decreasing_pairs": falls,
    "mountain_pattern": peaks,
}
NAMES = ["increasing_pairs", "mountain_pattern", "sorted_ascending", "palindrome", "decreasing_pairs"]


def write(folder: Path, *selections: list[str], **metadata: Any) -> Path:
    """Records with these patterns each."""
    folder.mkdir(parents=True)
    rows = [
        published(
            example_id=i,
            metadata=json.dumps({"selected_patterns": names, "target_pattern": names[0], **metadata}),
        )
        for i, names in enumerate(selections)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def labelled(folder: Path, labels: dict[str, list[str]]) -> None:
    """Write sequences with their labels beside the records."""
    rows = [{"sequence": sequence, "patterns": names} for sequence, names in labels.items()]
    about = {"vocab_size": V, "sequence_length": LENGTH, "sequences": rows}
    (folder / "baseline_dataset.json").write_text(json.dumps(about))


def meanings(records: JsonRecords, names: list[str]) -> dict[str, list[bool]]:
    """Which sequences of the universe each name in the records is of."""
    (_, record) = next(iter(records))
    matches = {pattern.name: pattern.matches(EVERY).tolist() for pattern in records.patterns}
    assert record.patterns == list(dict.fromkeys(records._names[name] for name in names))
    return {name: matches[records._names[name]] for name in names}


def test_names_alone_mean_what_they_meant_in_earlier_work(tmp_path: Path) -> None:
    told = Recorder()
    records = JsonRecords(write(tmp_path / "set", NAMES, ["palindrome"]), run=told)
    found = meanings(records, NAMES)
    words = [tuple(row) for row in EVERY.tolist()]
    for name, earlier in EARLIER.items():
        assert found[name] == [earlier(word) for word in words]
    # Two names of one set are one pattern, and count once.
    assert len(records.patterns) == 4 and found["increasing_pairs"] == found["sorted_ascending"]
    assert (records.spec.min_patterns_per_batch, records.spec.max_patterns_per_batch) == (1, 4)
    (text,) = (line for line in told.logs if "earlier work" in line)
    assert "increasing_pairs means sorted_ascending" in text and "patterns.json" in text
    zoo = open_zoo(tmp_path / "set")
    assert zoo.labels.sum(1).tolist() == [4, 1]


@pytest.mark.parametrize("where", ["argument", "file", "metadata"])
def test_definitions_win(where: str, tmp_path: Path) -> None:
    patterns = [{"name": name} for name in NAMES]
    folder = write(tmp_path / "set", NAMES, **({"pattern_definitions": patterns} if where == "metadata" else {}))
    if where == "file":
        (folder / "patterns.json").write_text(json.dumps({"patterns": patterns}))
    given = [PatternSpec.model_validate(pattern) for pattern in patterns] if where == "argument" else None
    told = Recorder()
    records = JsonRecords(folder, patterns=given, run=told)
    assert [pattern.name for pattern in records.patterns] == NAMES and not told.logs
    for name, mask in meanings(records, NAMES).items():
        assert name not in EARLIER or mask != [EARLIER[name](tuple(row)) for row in EVERY.tolist()]


def test_labelled_sequences_say_which(tmp_path: Path) -> None:
    current = {
        pattern.name: pattern
        for pattern in JsonRecords(
            write(tmp_path / "own", NAMES), patterns=[PatternSpec(name=name) for name in NAMES]
        ).patterns
    }
    sample = EVERY[torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(0))[:400]]
    extra = [[0, 0, 1, 1, 2], [0, 1, 0, 1, 3], [1, 0, 1, 0, 2], [4, 4, 2, 2, 0], [0, 2, 4, 1, 0], [0, 2, 2, 1, 0]]
    rows = [tuple(row) for row in [*sample.tolist(), *extra]]

    def word(row: Letters) -> str:
        return "".join(LETTERS[letter] for letter in row)

    def now(name: str, row: Letters) -> bool:
        return bool(current[name].matches(torch.tensor([row]))[0])

    def before(name: str, row: Letters) -> bool:
        return EARLIER[name](row) if name in EARLIER else now(name, row)

    for number, (holds, says, earlier) in enumerate(
        ((now, "are the built-in patterns: the labels", False), (before, "earlier work increasing_pairs means", True))
    ):
        folder = write(tmp_path / str(number), NAMES)
        labelled(folder, {word(row): [name for name in NAMES if holds(name, row)] for row in rows})
        told = Recorder()
        records = JsonRecords(folder, run=told)
        assert ("sorted_descending" in [pattern.name for pattern in records.patterns]) == earlier
        assert says in " ".join(told.logs) and "agree" in " ".join(told.logs)
    # One label to a sequence, of the pool that it was drawn from.
    folder = write(tmp_path / "single", NAMES)
    labelled(folder, {word(row): [name for name in NAMES if before(name, row)][:1] for row in rows})
    assert "sorted_descending" in [pattern.name for pattern in JsonRecords(folder).patterns]
    folder = write(tmp_path / "renamed", ["theirs", "palindrome"])
    labelled(folder, {word(row): ["theirs"] for row in rows if now("increasing_pairs", row)})
    (pattern, _) = JsonRecords(folder, rename={"theirs": "increasing_pairs"}).patterns
    assert pattern.name == "increasing_pairs"
    # Labels of neither.
    folder = write(tmp_path / "neither", NAMES)
    labelled(folder, {"ABCBA": ["increasing_pairs"]})
    with pytest.raises(
        InvalidInput, match=r"neither the built-in patterns nor, as in earlier work, sorted_asc"
    ) as caught:
        JsonRecords(folder)
    assert caught.value.violations[0].field == "baseline_dataset.json" and "patterns.json" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "current", "says"),
    [
        # Nothing is labelled with the names.
        (
            {"AAAAA": ["all_same"], "BBBBB": ["all_same"], "CBABC": ["palindrome"]},
            "",
            "means sorted_ascending, mountain",
        ),
        ({"CBABC": ["palindrome"], "CAFBD": []}, "", "means sorted_ascending, mountain"),
        ({"AAAAA": ["all_same", "palindrome"], "CBABC": ["palindrome"]}, "", "means sorted_ascending, mountain"),
        # One label to a sequence, which says nothing of what it leaves out.
        ({"AAAAA": ["all_same"], "ABCDE": ["increasing_pairs"]}, "", "agree with that and with the built-in"),
        # A label that only one meaning has.
        ({"ABABD": ["increasing_pairs"]}, "increasing_pairs", "increasing_pairs are the built-in patterns"),
        ({"AAAAB": ["increasing_pairs"], "CBABC": ["palindrome"]}, "", "labels in baseline_dataset.json agree;"),
        # All labels.
        (
            {"AAAAA": ["all_same", "palindrome"], "ABCDE": ["increasing_pairs"]},
            "increasing_pairs",
            "increasing_pairs are the built-in patterns",
        ),
    ],
)
def test_only_labels_of_a_name_say_what_it_means(
    labels: dict[str, list[str]], current: str, says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "set", ["increasing_pairs", "mountain_pattern", "all_same", "palindrome"])
    labelled(folder, labels)
    told = Recorder()
    names = [pattern.name for pattern in JsonRecords(folder, run=told).patterns]
    assert names == [current or "sorted_ascending", "earlier_mountain_pattern", "all_same", "palindrome"]
    # No sequence is labelled with it.
    assert any("mountain_pattern means earlier_mountain_pattern; a patterns.json" in line for line in told.logs)
    assert says in " ".join(told.logs)


def test_other_names_are_read_as_before(tmp_path: Path) -> None:
    told = Recorder()
    records = JsonRecords(write(tmp_path / "set", ["palindrome", "starts_with(B)"]), run=told)
    assert [pattern.name for pattern in records.patterns] == ["palindrome", "starts_with(B)"] and not told.logs
    with pytest.raises(InvalidInput, match="starts_with is not a built-in pattern; define it with patterns"):
        JsonRecords(write(tmp_path / "bare", ["starts_with"]))

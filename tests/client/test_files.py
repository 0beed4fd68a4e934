"""Specs from YAML and --set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ethogram.cli.files import read_mapping, set_values
from ethogram.errors import InvalidInput
from ethogram.plain import plain
from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from ethogram.transport import submission


def read(folder: Path, text: str | bytes) -> dict[str, Any]:
    file = folder / "spec.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_mapping(file, "spec")


def test_yaml_is_read_as_yaml_1_2(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 1e-3\nb: on\nc: 012\nd: null\ne: [1, {f: 'x'}]\n") == {
        "a": 0.001,
        "b": "on",
        "c": 12,
        "d": None,
        "e": [1, {"f": "x"}],
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; a spec is a mapping"),
        ("- 1\n", "holds a list; a spec is a mapping"),
        ("just words\n", "holds a string"),
        ("a: 1\na: 2\n", 'line 2: found duplicate key "a"'),
        ("a: [1\n", "line 2"),
        ("a: !!python/name:os.system x\n", "line 1: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "spec.yaml"),
        (b"a: \xff\xfe\n", "not UTF-8"),
        ("a: .nan\n", "spec.a: nan is not a finite number"),
        ("a: {b: [1, -.inf]}\n", "spec.a.b.1: -inf is not a finite number"),
        ("a: 2024-01-01\n", "spec.a: a date is not a JSON value"),
        ("1: a\n", "spec: the key 1 must be a string"),
        ("a: &x [*x]\n", "spec.a"),
        ("a: " + "[" * 2000 + "]" * 2000, "spec"),
    ],
)
def test_what_is_no_mapping_of_plain_values_is_named(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path, text)
    assert says in caught.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere.yaml cannot be read: No such file"):
        read_mapping(tmp_path / "nowhere.yaml", "spec")


def test_set_puts_values_into_mappings_and_lists() -> None:
    spec: dict[str, Any] = {"patterns": [{"name": "a"}, {"name": "b"}], "training": None}
    given = [
        "training.steps=500",
        "training.learning_rate=1e-3",
        "patterns.1.name=c",
        "x='7'",
        "y=",
        "z=[1, 2]",
        "e=a=b",
    ]
    assert set_values(spec, given, "spec") == {
        "patterns": [{"name": "a"}, {"name": "c"}],
        "training": {"steps": 500, "learning_rate": 0.001},
        "x": "7",
        "y": None,
        "z": [1, 2],
        "e": "a=b",
    }


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps", "write PATH=VALUE"),
        ("=3", "write PATH=VALUE"),
        ("a..b=3", "write PATH=VALUE"),
        ("patterns.7.name=c", "spec.patterns is a list of 1"),
        ("patterns.x=c", "number its items from 0"),
        ("number.deeper=1", "spec.number: is a number, so 'deeper' cannot be set in it"),
        ("a=[1", "--set a=[1"),
        ("a=.inf", "spec.a: inf is not a finite number"),
    ],
)
def test_a_wrong_set_is_explained(assignment: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        set_values({"patterns": [{}], "number": 3}, [assignment], "spec")
    assert says in caught.value.message


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    given = {
        "int": np.int64(4),
        "float": np.float32(0.5),
        "flag": np.bool_(True),
        "word": np.str_("a"),
        "list": [np.uint8(1), {"deep": np.float64(2.5)}],
        "array": np.array([[1, 2], [3, 4]]),
        "tensor": torch.tensor(3),
    }
    values = plain(given, "spec")
    assert json.dumps(values) == (
        '{"int": 4, "float": 0.5, "flag": true, "word": "a", "list": [1, {"deep": 2.5}], "array": [[1, 2], [3, 4]], '
        '"tensor": 3}'
    )
    for wrong, says in (
        (np.float32("nan"), "nan is not a finite"),
        (np.longdouble(1), "longdouble is not a JSON value"),
    ):
        with pytest.raises(InvalidInput, match=says):
            plain({"a": wrong}, "spec")


def test_specs_and_options_take_numbers_of_numpy() -> None:
    training = {"steps": np.int32(5), "learning_rate": np.float64(0.01)}
    spec = GenerationSpec(subjects=np.int64(4), seed=np.uint8(3), training=training)  # type: ignore[arg-type]
    assert spec == GenerationSpec(subjects=4, seed=3, training=SubjectTrainingSpec(steps=5, learning_rate=0.01))
    assert type(spec.subjects) is type(spec.training.steps) is int
    body = submission("generation", spec, {"priority": np.int64(2), "time_limit_seconds": np.float32(60)})  # type: ignore[typeddict-item]
    assert (body["priority"], body["time_limit_seconds"]) == (2, 60.0)
    json.dumps(body)
    with pytest.raises(ValidationError, match="valid integer"):
        GenerationSpec(subjects=np.float64(4))  # type: ignore[arg-type]

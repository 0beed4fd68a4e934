"""Tables: every form gives the same rows, and what is wrong is told by file, row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import BaseModel, Field

from ethogram.errors import MAX_VIOLATIONS, InvalidInput
from ethogram.specs.base import Spec
from services.language.tables import read_columns, read_table
from services.zoo.json_records import files_in

ROWS = [
    {"name": "small", "latency (ms)": 1.5, "gpus": 1, "_note": None},
    {"name": "7", "latency (ms)": 20.0, "gpus": 8, "_note": "two,\nlines"},
]
CSV = 'name,latency (ms),gpus,_note\nsmall,1.5,1,\n\n   \n7,20, 8,"two,\nlines"\n'


class Measurement(Spec):
    """A row with columns that are no names in Python."""

    name: str
    latency: float = Field(alias="latency (ms)")
    gpus: int
    note: str | None = Field(None, alias="_note")


class Profile(Spec):
    """A row of the tests."""

    name: str
    batch: int = 1
    kind: Literal["cpu", "gpu"] = "cpu"
    latency: float


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"table{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def violations(file: Path, row: type[BaseModel] = Measurement) -> list[tuple[str, str]]:
    with pytest.raises(InvalidInput) as caught:
        list(read_table(file, row))
    return [(violation.field, violation.description) for violation in caught.value.violations]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_form_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    if suffix == ".csv":
        # As spreadsheets write it, with a byte order mark.
        file.write_bytes(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").replace("two,\r\n", "two,\n").encode())
    else:
        file = write(tmp_path, suffix, ROWS)
    assert [row.model_dump(by_alias=True) for _, row in read_table(file, Measurement)] == ROWS
    assert read_columns(file) == (None if suffix == ".jsonl" else list(ROWS[0]))


def test_rows_of_a_model_have_its_defaults_and_text_becomes_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("latency,name,batch\n1e-3,a,\n2,b,16\n")
    assert list(read_table(file, Profile)) == [
        (2, Profile(name="a", latency=0.001)),
        (3, Profile(name="b", latency=2.0, batch=16)),
    ]
    # Other forms have types, so that text is no number there.
    wrong = violations(write(tmp_path, ".jsonl", [{"name": "a", "latency": "1"}]), Profile)
    assert wrong == [("table.jsonl:1.latency", "Input should be a valid number, not '1'")]


def test_all_that_is_wrong_is_told_and_the_rows_before_it_are_given(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(CSV + "a,fast,1,\nb,nan,,\nc,1\nd,inf,1.5,\n")
    rows = read_table(file, Measurement)
    assert [next(rows)[1].name, next(rows)[1].name] == ["small", "7"]
    with pytest.raises(InvalidInput, match=r"^a\.csv:7\.latency \(ms\): .*not 'fast' \(and 5 more\)$"):
        next(rows)
    assert [field for field, _ in violations(file)] == [
        "a.csv:7.latency (ms)",
        "a.csv:8.latency (ms)",
        "a.csv:8.gpus",
        "a.csv:9",
        "a.csv:10.latency (ms)",
        "a.csv:10.gpus",
    ]
    told = dict(violations(file))
    assert told["a.csv:8.latency (ms)"] == "Input should be a finite number, not 'nan'"
    assert told["a.csv:8.gpus"] == "is missing" and told["a.csv:9"] == "has 2 cells for 4 columns"


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"name": "a", "latency": NaN}\n{\n\n[1]\n{"name": "a", "latency": 1, "speed": 2}\n{"name": null}\n'
    )
    found = violations(file, Profile)
    assert [field for field, _ in found] == [
        "a.jsonl:1.latency",
        "a.jsonl:2",
        "a.jsonl:4",
        "a.jsonl:5.speed",
        "a.jsonl:6.name",
        "a.jsonl:6.latency",
    ]
    told = dict(found)
    assert "finite" in told["a.jsonl:1.latency"] and told["a.jsonl:2"].startswith("is not JSON (")
    assert told["a.jsonl:4"] == "is not a JSON object" and told["a.jsonl:5.speed"] == "there is no such column"
    assert told["a.jsonl:6.name"] == told["a.jsonl:6.latency"] == "is missing"
    file.write_text("{}\n[]\n" * 1000)
    assert len(violations(file, Profile)) == MAX_VIOLATIONS


def test_parquet_nulls_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "latency": 1.0, "batch": None},
        {"name": None, "latency": float("inf"), "batch": 2},
    ]
    assert violations(write(tmp_path, ".parquet", rows), Profile) == [
        ("table.parquet:2.name", "is missing"),
        ("table.parquet:2.latency", "Input should be a finite number, not inf"),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_that_are_missing_or_unknown_are_told_once(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("name,speed\na,1\nb,2\n")
    if suffix == ".parquet":
        file = write(tmp_path, suffix, [{"name": "a", "speed": 1}] * 2)
    assert violations(file, Profile) == [
        (f"{file.name}.latency", "is missing; there are name, speed"),
        (f"{file.name}.speed", "is no column of this table, which has name, batch, kind, latency"),
    ]

    class Name(BaseModel):
        """A row that may have other columns."""

        name: str

    assert [row.name for _, row in read_table(file, Name)][:1] == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "advised"),
    [
        ("a.csv", "name,speed\na,1\n", True),
        ("a.jsonl", '{"name": "a", "latency": 1, "speed": 1}', True),
        ("a.jsonl", '{"name": "a"}', True),
        # What is missing is named first.
        ("a.jsonl", '{"name": "a", "speed": 1}', True),
        ("a.jsonl", '{"name": "a", "latency": "x"}\n{"name": "a", "speed": 1}', True),
        ("a.jsonl", '{"name": "a", "latency": null}', False),
        ("a.jsonl", '{"name": "a", "latency": "x"}', False),
        ("a.csv", "name,latency\na,\n", False),
    ],
)
def test_advice_is_given_where_columns_are_others(name: str, content: str, advised: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput) as caught:
        list(read_table(tmp_path / name, Profile, advice="; take other columns"))
    assert str(caught.value).endswith("; take other columns") == advised


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("none.csv", None, "none.csv does not exist"),
        ("a.xlsx", b"", r"is none of \.csv, \.jsonl, \.parquet"),
        ("a.csv", b"", r"cannot be read as \.csv \(its first line must name the columns"),
        ("a.csv", b"a,a\n1,2\n", "each differently"),
        ("a.csv", b"name,latency\n\xff,1\n", "cannot be read as UTF-8 text"),
        ("a.csv", b'name,latency\n"a,1\n', r"a\.csv:2: is not CSV"),
        ("a.jsonl", b"\xff", "cannot be read as UTF-8 text"),
        ("a.parquet", b"PAR1", r"cannot be read as \.parquet"),
    ],
)
def test_files_that_are_no_tables(name: str, content: bytes | None, error: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=error):
        list(read_table(tmp_path / name, Profile, "spec.profile"))


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\u00a0b", "\ufeffa", "é"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_json_ends_at_a_line_feed_alone(text: str, end: str, tmp_path: Path) -> None:
    """As JSON is written elsewhere: text as it is, and a carriage return as white space between values."""
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"name": text, "latency": 1.0}, ensure_ascii=False), '{"name": "b",\r "latency": 2}', ""]
    file.write_bytes(end.join(lines).encode())
    assert [(row.name, row.latency) for _, row in read_table(file, Profile)] == [(text, 1.0), ("b", 2.0)]


def test_a_large_table_is_read_as_it_goes(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("name,latency\n" + "a,1\n" * 10_000 + "a,x\n")
    rows = read_table(file, Profile)
    assert next(rows)[1].name == "a"
    rows.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".csv", ".CSV"])
def test_long_cells_and_suffixes_in_capitals(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"table{suffix}"
    file.write_text(f"name,latency\n{'a' * 300_000},1\n")
    ((_, row),) = read_table(file, Profile)
    assert len(row.name) == 300_000 and row.latency == 1


def test_where_a_table_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"name,latency\n" + b"a,1\n" * 9000 + b"caf\xe9,1\n")
    with pytest.raises(InvalidInput, match=r"cannot be read as UTF-8 text \(line 9002, byte 4\)"):
        list(read_table(file, Profile))
    file.write_bytes("name,latency\na,1\n".encode("utf-16"))
    with pytest.raises(InvalidInput, match="it is UTF-16: save it as UTF-8"):
        list(read_table(file, Profile))


def test_json_records_ignore_hidden_files(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("b.jsonl", "a.parquet", "._b.jsonl", ".ipynb_checkpoints/b-checkpoint.jsonl"):
        (tmp_path / name).write_bytes(b"\xff")
    assert files_in(tmp_path) == [tmp_path / "a.parquet", tmp_path / "b.jsonl"]

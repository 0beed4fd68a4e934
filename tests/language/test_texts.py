"""Texts from files, folders and saved datasets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ethogram.errors import InvalidInput
from services.language.texts import Texts

TEXTS = [f"{i} " + " ".join("abcde"[: 1 + i % 5]) for i in range(1, 90)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """The texts as lines, some of them blank."""
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    return file


def texts(dataset: Path, **options: Any) -> list[str]:
    return list(Texts(str(dataset), field="spec.language_model", **options))


def test_texts_come_from_many_forms(lines: Path, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    parquet.write_table(pyarrow.Table.from_pylist(rows[30:]), folder / "b.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    for dataset in (lines, folder, tmp_path / "saved", tmp_path / "splits"):
        assert texts(dataset) == TEXTS
    with pytest.raises(
        InvalidInput, match=r"spec\.language_model\.column: .*no text in a column number; .*text, number"
    ):
        texts(folder, column="number")
    with pytest.raises(
        InvalidInput, match=r"spec\.language_model\.column: .*no text in a column title; .*text, number"
    ):
        texts(folder / "b.parquet", column="title")
    with pytest.raises(InvalidInput, match=r"spec\.language_model\.split: .*no test; there are train"):
        texts(tmp_path / "splits", split="test")
    (folder / "a.jsonl").write_text("{")
    with pytest.raises(InvalidInput, match=r"spec\.language_model\.dataset: .*a\.jsonl:1 is not JSON"):
        texts(folder)


def test_files_that_hold_no_texts(tmp_path: Path) -> None:
    def refused(dataset: Path, text: str) -> None:
        with pytest.raises(InvalidInput, match=text) as caught:
            texts(dataset)
        assert caught.value.violations[0].field == "spec.language_model.dataset"

    refused(tmp_path, r"has neither \.txt, \.jsonl, \.parquet files nor a saved dataset")
    refused(tmp_path / "nowhere.jsonl", "nowhere.jsonl does not exist")
    (tmp_path / "a.md").write_text("text")
    refused(tmp_path / "a.md", r"is none of \.txt, \.jsonl, \.parquet")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    refused(tmp_path / "a.txt", "cannot be read as UTF-8 text")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "a.parquet", r"a\.parquet cannot be read as \.parquet")
    (tmp_path / "dataset_info.json").write_text("{}")
    refused(tmp_path, "cannot be read as a saved dataset")


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", MARK + b"a\r\nb\r\n\r\nc", ["a", "b", "c"]),
        ("a.TXT", b"a\n", ["a"]),
        # Two files in one.
        ("a.txt", MARK + b"a\n" + MARK + b"b\n", ["a", "b"]),
        ("a.jsonl", MARK + b'{"text": "a"}\r\n' + MARK + b'{"text": "b"}\r\n', ["a", "b"]),
        ("a.JSONL", b'{"text": "a"}\n', ["a"]),
        ("a.txt", b"x" * 300_000 + b"\ny", ["x" * 300_000, "y"]),
        ("a.jsonl", b'{"text": "' + b"x" * 300_000 + b'"}', ["x" * 300_000]),
    ],
)
def test_marks_line_ends_and_long_lines(name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == texts(tmp_path) == expected


def test_rows_without_a_text_are_left_out_and_counted(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": "a", "n": 1}, {"text": None, "n": 2}, {"text": "b", "n": 3}, {"text": "", "n": 4}]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for dataset, first in (
        (folder, folder / "a.jsonl"),
        (tmp_path / "a.parquet", tmp_path / "a.parquet"),
        (tmp_path / "saved", tmp_path / "saved"),
    ):
        source = Texts(str(dataset))
        for _ in range(2):
            assert list(source) == ["a", "b"]
            assert source.left_out() == f"2 rows without a text (first: {first}:2)"


def test_what_is_mixed_is_counted_and_what_has_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n{"body": "c"}\n{"text": "\\ud800"}\n')
    parquet.write_table(pyarrow.table({"title": ["d"]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("text\ne\n")
    source = Texts(str(tmp_path))
    assert list(source) == ["a"]
    left_out = source.left_out().split("; ")
    assert left_out == [
        f"1 files other than .txt, .jsonl, .parquet (first: {tmp_path / 'c.csv'})",
        f"1 rows whose text is not a text (first: {tmp_path / 'a.jsonl'}:2)",
        f"1 rows without a text (first: {tmp_path / 'a.jsonl'}:3)",
        f"1 texts with half a surrogate pair, which no tokenizer takes (first: {tmp_path / 'a.jsonl'}:4)",
        f"1 files without a column text (first: {tmp_path / 'b.parquet'}, which has title)",
    ]
    with pytest.raises(InvalidInput, match=r"texts\.column: .*no text in a column none; there are text \(left out"):
        list(Texts(str(tmp_path), column="none"))


def test_a_folder_without_a_text_is_told_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(InvalidInput, match=r"texts\.dataset: .* has no texts \(left out: 1 files other than .*README"):
        list(Texts(str(tmp_path)))
    parquet.write_table(pyarrow.table({"title": ["d"]}), tmp_path / "b.parquet")
    with pytest.raises(InvalidInput, match=r"texts\.column: .*no text in a column text \(left out: .*which has title"):
        list(Texts(str(tmp_path)))


def test_the_columns_of_a_saved_dataset_are_judged_at_once(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": "a", "number": 1}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(InvalidInput, match=r"column: .*no text in a column title; there are text, number"):
        texts(tmp_path / "saved", column="title")
    with pytest.raises(InvalidInput, match=r"column: .*no text in its column number, but Value\('int64'\)"):
        texts(tmp_path / "saved", column="number")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InvalidInput, match=r"dataset: .*cannot be read as a saved dataset"):
        texts(tmp_path / "saved")


def test_hidden_files_are_ignored_and_links_followed(tmp_path: Path) -> None:
    folder, disk = tmp_path / "texts", tmp_path / "disk"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("old")
    (folder / "._a.txt").write_bytes(b"\0\xff")
    (folder / ".DS_Store").write_bytes(b"\xff")
    (folder / "a.txt").write_text("a")
    disk.mkdir()
    (disk / "b.txt").write_text("b")
    (folder / "linked").symlink_to(disk)
    (folder / "z.txt").symlink_to(disk / "b.txt")
    # In a circle.
    (disk / "back").symlink_to(folder)
    source = Texts(str(folder))
    assert list(source) == ["a", "b", "b"] and source.left_out() == ""
    (folder / "gone.txt").symlink_to(disk / "gone.txt")
    with pytest.raises(InvalidInput, match=r"dataset: .*gone\.txt is a link to nothing"):
        texts(folder)
    (folder / "gone.txt").unlink()
    os.mkfifo(folder / "pipe.txt")
    for dataset in (folder, folder / "pipe.txt"):
        with pytest.raises(InvalidInput, match=r"dataset: .*pipe\.txt is not a regular file"):
            texts(dataset)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.txt", "a\nb\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-be").join([b"\xfe\xff", b""]), "it is UTF-16"),
        # Far behind what is decoded at once.
        ("a.txt", b"text\n" * 9000 + b"caf\xe9\n", r"line 9001, byte 4"),
        ("a.txt", b"", "has no texts"),
        ("a.jsonl", b"\n\n", "has no texts"),
        (
            "a.jsonl",
            b'{"text": null}\n{"text": ""}\n',
            r"has no texts \(left out: 2 rows without a text",
        ),
        ("a.parquet", b"", r"cannot be read as \.parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a\.jsonl:2 is not JSON"),
        ("a.txt.gz", b"\x1f\x8b", r"is none of \.txt, \.jsonl, \.parquet"),
    ],
)
def test_files_that_cannot_be_read_name_the_place(name: str, content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=rf"^spec\.language_model\.dataset: .*{error}"):
        texts(tmp_path / name)

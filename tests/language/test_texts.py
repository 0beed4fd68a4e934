"""Texts from files, folders and saved datasets."""

from __future__ import annotations

import json
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

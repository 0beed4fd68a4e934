"""Texts from files, a folder of files, a saved dataset or a dataset on the Hugging Face Hub, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput
from services.artifacts.hub import hub_errors
from services.language.tables import Malformed, opening, read_columns, read_rows

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Files of a folder that datasets.save_to_disk wrote.
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


@dataclass(frozen=True)
class Texts:
    """The texts of a dataset, in order.

    Of a ``.txt`` file each line that is not blank is one; of others it is a column of each row. Going through them
    raises :class:`InvalidInput` for what cannot be read or has no such column, and
    :class:`ethogram.errors.Unavailable` without a Hub.
    """

    dataset: str
    """Text file, table, folder of them, folder of ``datasets.save_to_disk``, or a dataset's name on the Hub."""
    config: str | None = None
    """Configuration of a dataset on the Hub, if it has several."""
    split: str = "train"
    """Split of a saved dataset or one on the Hub."""
    column: str = "text"
    """Column of the text."""
    field: str = "texts"
    """Where errors say that these four fields are."""

    def __iter__(self) -> Iterator[str]:
        for source, row in self._rows():
            text = row.get(self.column)
            if not isinstance(text, str):
                raise self._no_column(source, row)
            if text:
                yield text

    def _error(self, name: str, text: str) -> InvalidInput:
        return InvalidInput.field(f"{self.field}.{name}", text)

    def _no_column(self, source: object, names: Iterable[str]) -> InvalidInput:
        there = f"; there are {', '.join(names)}" if names else ""
        return self._error("column", f"{source} has no text in a column {self.column}{there}")

    def _rows(self) -> Iterator[tuple[object, Mapping[str, Any]]]:
        """The file, folder or dataset of each row, and its values by column."""
        path = Path(self.dataset)
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            yield from ((path, row) for row in self._saved(path))
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
            if not files:
                raise self._error("dataset", f"{path} has neither {', '.join(SUFFIXES)} files nor a saved dataset")
            for file in files:
                yield from self._of_file(file)
        elif path.is_file():
            yield from self._of_file(path)
        elif path.suffix in SUFFIXES or path.is_absolute():
            raise self._error("dataset", f"{path} does not exist")
        else:
            yield from self._of_hub()

    def _of_file(self, file: Path) -> Iterator[tuple[object, Mapping[str, Any]]]:
        field = f"{self.field}.dataset"
        if file.suffix not in SUFFIXES:
            raise self._error("dataset", f"{file} is none of {', '.join(SUFFIXES)}")
        if file.suffix == ".txt":
            with opening(file, field), file.open(encoding="utf-8-sig") as lines:
                yield from ((file, {self.column: line.strip()}) for line in lines)
            return
        columns = read_columns(file, field)
        if columns is not None and self.column not in columns:
            raise self._no_column(file, columns)
        for number, row in read_rows(file, [self.column], field):
            if isinstance(row, Malformed):
                raise self._error("dataset", f"{file}:{number} {row}")
            yield file, row

    def _saved(self, folder: Path) -> Any:
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = f"{folder} cannot be read as a saved dataset ({type(error).__name__})"
            raise self._error("dataset", text) from None
        if not isinstance(saved, Mapping):
            return saved
        if self.split not in saved:
            raise self._error("split", f"{folder} has no {self.split}; there are {', '.join(saved)}")
        return saved[self.split]

    def _of_hub(self) -> Iterator[tuple[object, Mapping[str, Any]]]:
        import datasets

        with hub_errors(self.dataset, f"{self.field}.dataset", "read"):
            try:
                rows = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
                raise self._error("dataset", str(error).splitlines()[0]) from None
            yield from ((self.dataset, row) for row in rows)

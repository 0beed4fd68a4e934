"""Texts from files, a folder of files, a saved dataset or a dataset on the Hugging Face Hub, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput
from services.artifacts.hub import hub_errors
from services.language.tables import Malformed, read_columns, read_rows

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
        path = Path(self.dataset)
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            yield from self._of_rows(self._saved(path), str(path))
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
            if not files:
                raise self._error("dataset", f"{path} has neither {', '.join(SUFFIXES)} files nor a saved dataset")
            for file in files:
                yield from self._of_file(file)
        elif path.is_file():
            yield from self._of_file(path)
        elif path.suffix in SUFFIXES or path.is_absolute():
            raise self._error("dataset", f"{path} is not there")
        else:
            yield from self._of_hub()

    def _error(self, name: str, text: str) -> InvalidInput:
        return InvalidInput.field(f"{self.field}.{name}", text)

    def _of_file(self, file: Path) -> Iterator[str]:
        if file.suffix == ".txt":
            try:
                with file.open(encoding="utf-8-sig") as lines:
                    yield from (line.strip() for line in lines if line.strip())
            except (UnicodeDecodeError, OSError) as error:
                raise self._error("dataset", f"{file} cannot be read as UTF-8 text ({error})") from None
        elif file.suffix in SUFFIXES:
            field = f"{self.field}.dataset"
            columns = read_columns(file, field)
            if columns is not None and self.column not in columns:
                raise self._no_column(str(file), columns)
            yield from self._of_rows(self._well_formed(file, field), str(file))
        else:
            raise self._error("dataset", f"{file} is none of {', '.join(SUFFIXES)}")

    def _well_formed(self, file: Path, field: str) -> Iterator[dict[str, Any]]:
        for number, values in read_rows(file, [self.column], field):
            if isinstance(values, Malformed):
                raise InvalidInput.field(field, f"{file}:{number} {values}")
            yield values

    def _of_rows(self, rows: Iterable[Any], source: str) -> Iterator[str]:
        for row in rows:
            if not isinstance(row.get(self.column), str):
                raise self._no_column(source, list(row))
            if row[self.column]:
                yield row[self.column]

    def _no_column(self, source: str, names: list[str]) -> InvalidInput:
        there = f"; there are {', '.join(names)}" if names else ""
        return self._error("column", f"{source} has no text in a column {self.column}{there}")

    def _saved(self, folder: Path) -> Any:
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._error(
                "dataset", f"{folder} cannot be read as a saved dataset ({type(error).__name__})"
            ) from None
        if not isinstance(saved, Mapping):
            return saved
        if self.split not in saved:
            raise self._error("split", f"{folder} has no {self.split}; there are {', '.join(saved)}")
        return saved[self.split]

    def _of_hub(self) -> Iterator[str]:
        import datasets

        with hub_errors(self.dataset, f"{self.field}.dataset", "read"):
            try:
                rows = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
                raise self._error("dataset", str(error).splitlines()[0]) from None
            yield from self._of_rows(rows, self.dataset)

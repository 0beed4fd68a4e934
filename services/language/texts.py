"""Texts from files, a folder of files, a saved dataset or a dataset on the Hugging Face Hub, one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput
from services.artifacts.hub import hub_errors
from services.language.tables import BYTE_ORDER_MARK, Malformed, files_below, opening, read_columns, read_rows
from services.runtime.reading import first_line

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Files of a folder that datasets.save_to_disk wrote.
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
_STRINGS = ("string", "large_string", "string_view")


@dataclass(frozen=True)
class Texts:
    """The texts of a dataset, in order.

    Of a ``.txt`` file each line that is not blank is one; of others it is a column of each row. Rows without a text,
    and files of a folder that have another form or lack the column, are left out and counted: see :meth:`left_out`.
    Going through them raises :class:`InvalidInput` for what cannot be read, and where there is no text at all, and
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
    _counts: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """What was left out: how many, and the first of them."""

    def __iter__(self) -> Iterator[str]:
        self._counts.clear()
        found, columns, has_column = False, list[str](), False
        for source, text, names in self._values():
            columns = columns or list(names)
            has_column = has_column or self.column in names
            if text is None or text == "":
                self._leave_out("rows without a text", source)
            elif not isinstance(text, str):
                self._leave_out(self._of_other_type, source)
            elif not _is_unicode(text):
                self._leave_out("texts with half a surrogate pair, which no tokenizer takes", source)
            else:
                found = True
                yield text
        wrong_column = {self._of_other_type, self._without_column} & self._counts.keys()
        if not found and (wrong_column or (columns and not has_column)):
            raise self._no_column(self.dataset, columns)
        if not found:
            raise self._error("dataset", f"{self.dataset} has no texts{self._left_out()}")

    def left_out(self) -> str:
        """What was left out when the texts were last gone through, counted; empty if nothing was."""
        return "; ".join(f"{count} {what} (first: {first})" for what, (count, first) in self._counts.items())

    def unused(self) -> list[str]:
        """Those of ``config``, ``split`` and ``column`` that were set, and that this kind of dataset does not have."""
        path = Path(self.dataset)
        if not path.exists():
            return []
        saved = path.is_dir() and any((path / name).is_file() for name in _SAVED)
        names = ["config"] + ["split"] * (not saved) + ["column"] * (path.suffix.lower() == ".txt")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def _of_other_type(self) -> str:
        return f"rows whose {self.column} is not a text"

    @property
    def _without_column(self) -> str:
        return f"files without a column {self.column}"

    def _left_out(self) -> str:
        return f" (left out: {self.left_out()})" if self._counts else ""

    def _leave_out(self, what: str, source: object) -> None:
        count, first = self._counts.get(what, (0, str(source)))
        self._counts[what] = count + 1, first

    def _error(self, name: str, text: str) -> InvalidInput:
        return InvalidInput.field(f"{self.field}.{name}", text)

    def _no_column(self, source: object, names: Collection[str]) -> InvalidInput:
        there = f"; there are {', '.join(names)}" if names else ""
        return self._error("column", f"{source} has no text in a column {self.column}{there}{self._left_out()}")

    def _values(self) -> Iterator[tuple[object, Any, Collection[str]]]:
        """The source of each row, what it has as text, and the names of its columns."""
        path = Path(self.dataset)
        if path.is_dir() and any((path / name).is_file() for name in _SAVED):
            yield from self._saved(path)
        elif path.is_dir():
            files, others = files_below(path, SUFFIXES, f"{self.field}.dataset")
            if not files:
                raise self._error("dataset", f"{path} has neither {', '.join(SUFFIXES)} files nor a saved dataset")
            for file in others:
                self._leave_out(f"files other than {', '.join(SUFFIXES)}", file)
            for file in files:
                yield from self._of_file(file)
        elif path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise self._error("dataset", f"{path} is none of {', '.join(SUFFIXES)}")
            yield from self._of_file(path)
        elif path.suffix.lower() in SUFFIXES or path.is_absolute():
            text = "is not a regular file" if path.exists() else "does not exist"
            raise self._error("dataset", f"{path} {text}")
        else:
            yield from self._of_hub()

    def _of_file(self, file: Path) -> Iterator[tuple[object, Any, Collection[str]]]:
        field = f"{self.field}.dataset"
        if file.suffix.lower() == ".txt":
            with opening(file, field), file.open(encoding="utf-8-sig") as lines:
                texts = (line.removeprefix(BYTE_ORDER_MARK).strip() for line in lines)
                yield from ((file, text, ()) for text in texts if text)
            return
        columns = read_columns(file, field)
        if columns is not None and self.column not in columns:
            if str(file) == self.dataset:
                raise self._no_column(file, columns)
            self._leave_out(self._without_column, f"{file}, which has {', '.join(columns)}")
            return
        for number, row in read_rows(file, [self.column], field):
            if isinstance(row, Malformed):
                raise self._error("dataset", f"{file}:{number} {row}")
            yield f"{file}:{number}", row.get(self.column), columns or row

    def _saved(self, folder: Path) -> Iterator[tuple[object, Any, Collection[str]]]:
        import datasets

        try:
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, Mapping):
                if self.split not in saved:
                    raise self._error("split", f"{folder} has no {self.split}; there are {', '.join(saved)}")
                saved = saved[self.split]
            yield from self._of_dataset(saved)
        except InvalidInput:
            raise
        # Files that are missing, broken, or hold something else.
        except Exception as error:
            text = f"{folder} cannot be read as a saved dataset ({type(error).__name__}: {first_line(error)})"
            raise self._error("dataset", text) from None

    def _of_hub(self) -> Iterator[tuple[object, Any, Collection[str]]]:
        import datasets

        with hub_errors(self.dataset, f"{self.field}.dataset", "read"):
            try:
                rows = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            except (ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
                raise self._error("dataset", first_line(error)) from None
            yield from self._of_dataset(rows)

    def _of_dataset(self, rows: Any) -> Iterator[tuple[object, Any, Collection[str]]]:
        """Rows of ``datasets``. What its columns are is known before any row, often."""
        features = rows.features
        if features is not None:
            if self.column not in features:
                raise self._no_column(self.dataset, features)
            feature = features[self.column]
            if getattr(feature, "dtype", None) not in _STRINGS:
                raise self._error("column", f"{self.dataset} has no text in its column {self.column}, but {feature}")
            # Others may need libraries of images or sound.
            rows = rows.select_columns([self.column])
        for number, row in enumerate(rows, 1):
            if self.column not in row:
                raise self._no_column(self.dataset, row)
            yield f"{self.dataset}:{number}", row[self.column], row


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 has it; JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""Tables that users bring: CSV, JSON lines and parquet files, read row by row.

Errors name the file, the row and the column. A row of a text file has the number of its (first) line, as an editor
shows it; the rows of a parquet file count from 1.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import ArrowException, parquet
from pydantic import BaseModel, ValidationError

from ethogram.errors import MAX_VIOLATIONS, InvalidInput, Violation
from services.runtime.reading import first_line, reason_of

SUFFIXES = (".csv", ".jsonl", ".parquet")
# Rows of a parquet file that are in memory at once; they may be large.
_BATCH = 64
_COLUMN_ERRORS = ("missing", "extra_forbidden")
"""Pydantic's errors of JSON lines that do not have the columns of the table."""
BYTE_ORDER_MARK = "\ufeff"

RowT = TypeVar("RowT", bound=BaseModel)


class Malformed(str):
    """Stands for a row that cannot be read, and says why."""


def read_columns(file: Path, field: str | None = None) -> list[str] | None:
    """Names of a table's columns; None of JSON lines, where each row has its own. Raises as :func:`read_rows` does."""
    with opening(file, field):
        if file.suffix.lower() == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as lines:
                return _header(csv.reader(lines, strict=True))
        if file.suffix.lower() == ".parquet":
            return list(parquet.read_schema(file).names)
    return None


def read_rows(
    file: Path, columns: Collection[str] | None = None, field: str | None = None, form: str | None = None
) -> Iterator[tuple[int, dict[str, Any] | Malformed]]:
    """Each row's number and its values by column, or a :class:`Malformed`.

    Values of a CSV file are text. Empty cells, and nulls of a parquet file, are left out; blank lines are skipped.
    ``columns``: the only ones that are read of a parquet file, where it has them. ``form``: by default the file's
    suffix. Raises :class:`InvalidInput` of ``field`` (by default the file itself) for a file that is missing or not of
    that form.
    """
    form = form or file.suffix.lower()
    with opening(file, field):
        if form == ".csv":
            yield from _csv_rows(file)
        elif form == ".jsonl":
            yield from _json_rows(file)
        elif form == ".parquet":
            yield from _parquet_rows(file, columns)
        else:
            raise _wrong(file, field, f"is none of {', '.join(SUFFIXES)}")


def read_table(file: Path, row: type[RowT], field: str | None = None, advice: str = "") -> Iterator[tuple[int, RowT]]:
    """The rows of a table with their numbers, each checked against the pydantic model ``row``.

    Text of a CSV file is converted to the fields' types; a field that is missing or empty has its default. The model
    says whether other columns (``extra``) and NaN and infinity (``allow_inf_nan``) are allowed. ``advice`` ends an
    error in which columns are missing or unknown; an empty cell of a CSV file or a null is no missing column.

    Rows are yielded while all are right. After the first wrong one the rest is only checked, and :class:`InvalidInput`
    lists up to :data:`ethogram.errors.MAX_VIOLATIONS` wrong values, each with the field ``FILE:ROW.COLUMN``. Missing
    and unknown columns of CSV and parquet files are found before any row is read.
    """
    columns = {info.alias or name: info for name, info in row.model_fields.items()}
    violations: list[Violation] = []
    is_of_columns = False
    header = read_columns(file, field)
    if header is not None:
        for name, info in columns.items():
            if info.is_required() and name not in header:
                violations.append(Violation(f"{file.name}.{name}", f"is missing; there are {', '.join(header)}"))
        if row.model_config.get("extra") == "forbid":
            text = f"is no column of this table, which has {', '.join(columns)}"
            violations += [Violation(f"{file.name}.{name}", text) for name in header if name not in columns]
        if violations:
            raise _invalid(violations, advice)
    for number, values in read_rows(file, columns, field):
        location = f"{file.name}:{number}"
        try:
            if isinstance(values, Malformed):
                violations.append(Violation(location, values))
            else:
                checked = row.model_validate(values, strict=False if file.suffix.lower() == ".csv" else None)
                if not violations:
                    yield number, checked
        except ValidationError as error:
            details = error.errors(include_url=False)
            violations += [_violation(location, detail) for detail in details]
            is_of_columns |= header is None and any(detail["type"] in _COLUMN_ERRORS for detail in details)
        if len(violations) >= MAX_VIOLATIONS:
            break
    if violations:
        raise _invalid(violations, advice if is_of_columns else "")


def _violation(location: str, detail: Any) -> Violation:
    """Pydantic's finding about one value."""
    column = ".".join([location, *(str(part) for part in detail["loc"])])
    if detail["type"] == "extra_forbidden":
        return Violation(column, "there is no such column")
    if detail["type"] == "missing" or detail["input"] is None:
        return Violation(column, "is missing")
    value = repr(detail["input"])
    return Violation(column, f"{detail['msg']}, not {value if len(value) <= 40 else f'{value[:40]}...'}")


def _invalid(violations: list[Violation], advice: str) -> InvalidInput:
    first, more = violations[0], f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return InvalidInput(f"{first.field}: {first.description}{more}{advice}", violations)


@contextmanager
def opening(file: Path, field: str | None) -> Iterator[None]:
    """Raise what goes wrong with the whole file as :class:`InvalidInput`."""
    try:
        yield
    except FileNotFoundError:
        raise _wrong(file, field, "does not exist") from None
    except UnicodeDecodeError as error:
        where = first_line(error) if file.suffix.lower() == ".parquet" else _undecodable(file)
        raise _wrong(file, field, f"cannot be read as UTF-8 text ({where})") from None
    except (OSError, ValueError, csv.Error, ArrowException) as error:
        form = f" as {file.suffix}" if file.suffix else ""
        raise _wrong(file, field, f"cannot be read{form} ({reason_of(error)})") from None


def _wrong(file: Path, field: str | None, text: str) -> InvalidInput:
    return InvalidInput.field(field, f"{file} {text}") if field else InvalidInput.field(str(file), text)


def _undecodable(file: Path) -> str:
    """Where a file is not UTF-8, and what it may be."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "it is UTF-16: save it as UTF-8"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "it changed meanwhile"


def files_below(folder: Path, suffixes: Collection[str], field: str) -> tuple[list[Path], list[Path]]:
    """The files of ``folder`` and the folders in it that have one of ``suffixes`` (in any case), and the others; each
    in the order of their paths.

    Links are followed, and a folder is read once. Files and folders whose names begin with a dot are left out: they are
    an editor's or the system's. Raises :class:`InvalidInput` of ``field`` for a file with one of ``suffixes`` that
    cannot be opened as one, e.g. a link to nothing, and for a folder that cannot be read.
    """
    files, others, folders, seen = list[Path](), list[Path](), [folder], set[Path]()
    while folders:
        folder = folders.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        with opening(folder, field):
            inner = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in sorted(inner):
            if path.is_dir():
                # Links last: what can be had without them is read by its own path.
                folders.insert(0 if path.is_symlink() else len(folders), path)
            elif path.suffix.lower() not in suffixes:
                others.append(path)
            elif path.is_file():
                files.append(path)
            else:
                what = "is a link to nothing" if path.is_symlink() else "is not a regular file"
                raise InvalidInput.field(field, f"{path} {what}; remove it, or put the file there")
    return sorted(files), sorted(others)


def _header(reader: Iterator[list[str]]) -> list[str]:
    names = [name.strip() for name in next((cells for cells in reader if not _blank(cells)), [])]
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError("its first line must name the columns, each differently")
    return names


def _blank(cells: list[str]) -> bool:
    return len(cells) <= 1 and not "".join(cells).strip()


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | Malformed]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        # A cell may be a whole document; the default is 128 KiB.
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(lines, strict=True)
        names = _header(reader)
        number = reader.line_num + 1
        try:
            for cells in reader:
                if len(cells) == len(names) and not _blank(cells):
                    yield number, {name: cell for name, cell in zip(names, cells, strict=True) if cell.strip()}
                elif not _blank(cells):
                    yield number, Malformed(f"has {len(cells)} cells for {len(names)} columns")
                number = reader.line_num + 1
        except csv.Error as error:
            # Where this row ends is not known.
            yield number, Malformed(f"is not CSV ({error})")


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | Malformed]]:
    # A line ends at a line feed alone: others are white space, or part of a text.
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # Files that were joined have byte order marks inside.
                value = json.loads(line.removeprefix(BYTE_ORDER_MARK))
            except (ValueError, RecursionError) as error:
                value = Malformed(f"is not JSON ({error})")
            yield number, value if isinstance(value, dict | Malformed) else Malformed("is not a JSON object")


def _parquet_rows(file: Path, columns: Collection[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        chosen = names if columns is None else [name for name in names if name in columns]
        for batch in table.iter_batches(_BATCH, columns=chosen):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}

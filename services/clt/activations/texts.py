"""Texts for a language model, from files, a ``datasets`` folder or the Hugging Face Hub, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyarrow import ArrowInvalid, parquet

from ethogram.errors import InvalidInput
from ethogram.specs.clt import LanguageModelSpec
from services.artifacts.hub import hub_errors

_FIELD = "spec.language_model"
_SUFFIXES = (".txt", ".jsonl", ".parquet")
# What datasets.save_to_disk leaves.
_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


def texts(spec: LanguageModelSpec) -> Iterator[str]:
    """The texts, in order. Of a ``.txt`` file each line that is not blank is one; of ``.jsonl`` and ``.parquet`` files
    the column ``spec.column``. Raises :class:`InvalidInput` for what cannot be read or has no such column."""
    place = Path(spec.dataset)
    if place.is_dir() and any((place / name).is_file() for name in _SAVED):
        yield from _of_rows(_saved(spec, place), spec, str(place))
    elif place.is_dir():
        files = [file for file in sorted(place.rglob("*")) if file.suffix in _SUFFIXES]
        if not files:
            text = f"{place} has neither {', '.join(_SUFFIXES)} files nor a dataset that was saved"
            raise InvalidInput.field(f"{_FIELD}.dataset", text)
        for file in files:
            yield from _of_file(spec, file)
    elif place.is_file():
        yield from _of_file(spec, place)
    elif place.suffix in _SUFFIXES or place.is_absolute():
        raise InvalidInput.field(f"{_FIELD}.dataset", f"{place} is not there")
    else:
        yield from _of_hub(spec)


def _of_file(spec: LanguageModelSpec, file: Path) -> Iterator[str]:
    try:
        if file.suffix == ".txt":
            with file.open(encoding="utf-8") as lines:
                yield from (line.strip() for line in lines if line.strip())
        elif file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                yield from _of_rows((json.loads(line) for line in lines if line.strip()), spec, str(file))
        elif file.suffix == ".parquet":
            with parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                if spec.column not in names:
                    raise _no_column(spec, str(file), names)
                for batch in table.iter_batches(columns=[spec.column]):
                    yield from _of_rows(batch.to_pylist(), spec, str(file))
        else:
            raise InvalidInput.field(f"{_FIELD}.dataset", f"{file} is none of {', '.join(_SUFFIXES)}")
    except (UnicodeDecodeError, json.JSONDecodeError, ArrowInvalid, OSError) as error:
        text = f"{file} cannot be read as {file.suffix} ({str(error).splitlines()[0]})"
        raise InvalidInput.field(f"{_FIELD}.dataset", text) from None


def _of_rows(rows: Any, spec: LanguageModelSpec, where: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get(spec.column), str):
            raise _no_column(spec, where, list(row) if isinstance(row, Mapping) else [])
        if row[spec.column]:
            yield row[spec.column]


def _no_column(spec: LanguageModelSpec, where: str, names: list[str]) -> InvalidInput:
    there = f"; there are {', '.join(names)}" if names else ""
    return InvalidInput.field(f"{_FIELD}.column", f"{where} has no text in a column {spec.column}{there}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        text = "reading it needs the package datasets; install it, or give a .txt, .jsonl or .parquet file"
        raise InvalidInput.field(f"{_FIELD}.dataset", text) from None
    return datasets


def _saved(spec: LanguageModelSpec, place: Path) -> Any:
    try:
        found = _datasets().load_from_disk(str(place))
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{place} cannot be read as a saved dataset ({type(error).__name__})"
        raise InvalidInput.field(f"{_FIELD}.dataset", text) from None
    if isinstance(found, Mapping):
        if spec.split not in found:
            raise InvalidInput.field(f"{_FIELD}.split", f"{place} has no {spec.split}; there are {', '.join(found)}")
        return found[spec.split]
    return found


def _of_hub(spec: LanguageModelSpec) -> Iterator[str]:
    datasets = _datasets()
    with hub_errors(spec.dataset, f"{_FIELD}.dataset", "read"):
        try:
            rows = datasets.load_dataset(spec.dataset, spec.config, split=spec.split, streaming=True)
        except (ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise InvalidInput.field(f"{_FIELD}.dataset", str(error).splitlines()[0]) from None
        yield from _of_rows(rows, spec, spec.dataset)

"""A trained encoder: configurations to vectors. Needs no language model, unless it is to describe what it embeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import MAX_VIOLATIONS, InvalidInput, Violation
from ethogram.specs.resource import MOST, ResourceSpec, SchemaSpec, has_more_decimals
from services.resource.data import Table
from services.resource.model import ResourceEncoder
from services.resource.schema import Schema
from services.runtime.reading import reading
from services.runtime.tensors import write_tensors

CONFIG, WEIGHTS, TABLE = "encoder.json", "encoder.safetensors", "table.safetensors"
FORMAT = 1
UNKNOWN = "unknown"
"""What stands for the value of a dimension that is not known."""
_SHOWN = 40
"""Characters of a value in an error at most."""
CHUNK = 4096
"""Vectors that go through the encoder at once."""


class Column(NamedTuple):
    """Values of one field, a row each."""

    values: NDArray[np.float64] | Sequence[str]
    """Of a number, or labels of a category."""
    unknown: NDArray[np.bool_] | None = None
    """Which are not known; None: none."""


class ResourceCodec:
    """An encoder with its schema; see :meth:`load`."""

    def __init__(
        self,
        spec: ResourceSpec,
        schema: Schema,
        model: ResourceEncoder,
        about: Mapping[str, Any] | None = None,
        table: Table | None = None,
    ) -> None:
        """``about``: what it was trained with: digests of the table and the language model, and that model's name.
        ``table``: the rows that it was trained on, which recommendations need."""
        self.spec, self.schema, self.model = spec, schema, model.eval()
        self.about = dict(about or {})
        self.table = table

    @property
    def device(self) -> torch.device:
        return self.model.gain.device

    @property
    def hidden(self) -> int:
        """The language model's hidden size."""
        return self.model.tool_vectors.shape[1]

    @property
    def size(self) -> int:
        """Length of an embedding: soft tokens times the language model's hidden size."""
        return self.spec.encoder.tokens * self.hidden

    def vectors(self, rows: Sequence[Mapping[str, Any]], field: str = "rows") -> tuple[Tensor, Tensor]:
        """Vectors ``[rows, fields]``, float64, of configurations by name, and which fields are unknown: those that are
        ``unknown``, None or left out.

        Raises :class:`InvalidInput` that names the row and the field for a tool, a label or a field that the schema
        does not have, a number that is not finite or negative, one that is not measured and has more decimals than
        descriptions, apart from the rounding errors of floating point, which are taken away, and an unknown tool.
        """
        return self._vectors(rows, [f"{field}.{number}" for number in range(len(rows))])

    def vector(self, row: Mapping[str, Any], field: str = "given") -> tuple[Tensor, Tensor]:
        """:meth:`vectors` of one configuration, each ``[fields]``; errors name the field alone."""
        values, unknown = self._vectors([row], [field])
        return values[0], unknown[0]

    def _vectors(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> tuple[Tensor, Tensor]:
        """:meth:`vectors`; ``places``: what errors call each row."""
        known = set(self.schema.names)
        texts = {name: self.schema.no_field(str(name)) for name in set().union(*rows) - known}
        wrong = [
            Violation(f"{place}.{name}", texts[name])
            for place, row in zip(places, rows, strict=True)
            for name in row.keys() - known
        ]
        values, unknown = self._blank(len(rows))
        for index, dimension in enumerate(self.schema.dimensions):
            given = [row.get(dimension.name) for row in rows]
            values[:, index], unknown[:, index], faults = self._column(index, given)
            wrong += [Violation(f"{places[number]}.{dimension.name}", text) for number, text in faults.items()]
        _raise(wrong)
        return torch.from_numpy(values), torch.from_numpy(unknown)

    def column_vectors(
        self, columns: Mapping[str, Column], rows: int, field: str = "columns", *, requirements: bool = False
    ) -> tuple[Tensor, Tensor]:
        """:meth:`vectors` of columns by name, each with ``rows`` values; a column that is left out is unknown in all
        rows. ``requirements``: what is measured is refused.

        Raises :class:`InvalidInput` that names the field, and the row behind it.
        """
        other = sorted(columns.keys() - set(self.schema.names))[:MAX_VIOLATIONS]
        wrong = [Violation(f"{field}.{name}", self.schema.no_field(name)) for name in other]
        values, unknown = self._blank(rows)
        unknown[:] = True
        for index, dimension in enumerate(self.schema.dimensions):
            where, column = f"{field}.{dimension.name}", columns.get(dimension.name)
            if column is None:
                if index == 0:
                    wrong.append(Violation(where, "is missing: the tool must be known"))
            elif {len(column.values), len(column.values if column.unknown is None else column.unknown)} != {rows}:
                wrong.append(Violation(where, f"must have a value for each of the {rows} rows"))
            else:
                values[:, index], unknown[:, index], faults = self._column(index, *column)
                if requirements and dimension.measured:
                    chosen = (~unknown[:, index]).nonzero()[0].tolist()
                    faults |= dict.fromkeys(chosen, "is measured, and cannot be chosen; leave it out")
                wrong += [Violation(f"{where}.{row}", text) for row, text in faults.items()]
        _raise(wrong)
        return torch.from_numpy(values), torch.from_numpy(unknown)

    def _blank(self, rows: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        shape = rows, len(self.schema.dimensions)
        return np.zeros(shape), np.zeros(shape, dtype=np.bool_)

    def _column(
        self, index: int, given: NDArray[np.float64] | Sequence[Any], unknown: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], dict[int, str]]:
        """Values of one field, which of them are unknown, and what is wrong with some, by row."""
        dimension, labels = self.schema.dimensions[index], self._places[index]
        hidden = np.zeros(len(given), dtype=np.bool_) if unknown is None else unknown
        if not isinstance(given, np.ndarray):
            hidden = hidden | [value is None or (value == UNKNOWN and UNKNOWN not in labels) for value in given]
        if not dimension.number:
            numbers = np.array([labels.get(value, -1) if isinstance(value, str) else -1 for value in given], float)
        elif isinstance(given, np.ndarray):
            numbers = given
        else:
            numbers = np.array([_float(value) if _is_number(value) else math.nan for value in given])
        bad = ~((numbers >= 0) & (numbers <= MOST)) & ~hidden
        faults = {}
        for row in bad.nonzero()[0].tolist():
            shown = _shown(given[row].item() if isinstance(given, np.ndarray) else given[row])
            allowed = f"a number from 0 to {MOST}" if dimension.number else f"one of {', '.join(labels)}"
            faults[row] = f"must be {allowed}, not {shown}"
        if dimension.number and not dimension.measured:
            # As in tables: descriptions would take it for another configuration.
            known = np.where(hidden | bad, 0.0, numbers)
            numbers = np.round(known, dimension.decimals)
            for row in (numbers != known).nonzero()[0].tolist():
                if has_more_decimals(float(known[row]), dimension.decimals):
                    text = f"has more decimals than its descriptions, which have {dimension.decimals}"
                    faults[row] = f"{known[row]:.15g} {text}"
        if index == 0:
            faults |= dict.fromkeys(hidden.nonzero()[0].tolist(), "the tool must be known")
        return np.where(hidden | bad, 0.0, numbers), hidden, faults

    @cached_property
    def _places(self) -> list[dict[str, int]]:
        """Index of each label, by dimension."""
        return [{label: index for index, label in enumerate(dimension.labels)} for dimension in self.schema.dimensions]

    @cached_property
    def _range(self) -> tuple[Tensor, Tensor]:
        """Ends of the range of each dimension; of a category all values are inside."""
        ends = [((d.low or 0.0, d.high or MOST) if d.number else (0.0, float(MOST))) for d in self.schema.dimensions]
        low, high = torch.tensor(ends, dtype=torch.float64).unbind(1)
        return low, high

    def outside(self, values: Tensor, unknown: Tensor) -> list[list[str]]:
        """Names of the numbers of each row that are outside the range of training; embeddings of these are less
        exact."""
        names: list[list[str]] = [[] for _ in values]
        for row, index in self.outside_mask(values, unknown).nonzero().tolist():
            names[row].append(self.schema.names[index])
        return names

    def is_outside(self, index: int, value: float) -> bool:
        """Whether a predicted number of the field ``index`` is outside the range of training."""
        low, high = self._range
        return not float(low[index]) <= value <= float(high[index])

    def outside_mask(self, values: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Which known numbers are outside the range of training, ``[rows, fields]``."""
        low, high = self._range
        outside = (values < low) | (values > high)
        return outside if unknown is None else outside & ~unknown

    @torch.no_grad()
    def embed(self, values: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Embeddings ``[rows, size]``, float32 on the CPU, of vectors ``[rows, fields]``."""
        unknown = torch.zeros_like(values, dtype=torch.bool) if unknown is None else unknown
        parts = [
            self.model(part, hidden).flatten(1).float().cpu()
            for part, hidden in zip(torch.split(values, CHUNK), torch.split(unknown, CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.size)

    def soft(self, embeddings: Tensor) -> Tensor:
        """Embeddings ``[rows, size]`` as soft tokens ``[rows, tokens, hidden]``."""
        return torch.unflatten(embeddings, 1, (self.spec.encoder.tokens, -1))

    def save(self, folder: Path) -> None:
        """Write ``encoder.json``, ``encoder.safetensors`` and, with a table, ``table.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.model.state_dict())
        if self.table is not None:
            write_tensors(folder / TABLE, {"values": self.table.values})
        (folder / CONFIG).write_text(json.dumps(self.config(), indent=2), encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """All but the tensors, as JSON has it."""
        return {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "schema": self.schema.spec.model_dump(mode="json"),
            "tools": list(self.schema.tools),
            "inferred": sorted(self.schema.inferred),
            **self.about,
        }

    @staticmethod
    def load(folder: Path, device: str = "cpu") -> ResourceCodec:
        """Read what :meth:`save` wrote. Raises :class:`InvalidInput`."""
        with _reading(folder, CONFIG) as path:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config["format"] != FORMAT:
                raise InvalidInput.field(path.name, f"has format {config['format']!r}; this version reads {FORMAT}")
        with _reading(folder, WEIGHTS) as path:
            state = load_file(path)
        values = None
        if (folder / TABLE).exists():
            with _reading(folder, TABLE) as path:
                values = load_file(path)["values"]
        with _reading(folder, CONFIG):
            return ResourceCodec.of(config, state, values, device)

    @staticmethod
    def of(
        config: Mapping[str, Any], state: Mapping[str, Tensor], values: Tensor | None = None, device: str = "cpu"
    ) -> ResourceCodec:
        """The encoder with this :meth:`config`, these weights, and the ``values`` of its table. Raises
        :class:`InvalidInput` for a table of other fields."""
        spec = ResourceSpec.model_validate(config["spec"])
        schema = Schema(
            SchemaSpec.model_validate(config["schema"]), tuple(config["tools"]), frozenset(config.get("inferred", ()))
        )
        if values is not None and (values.ndim != 2 or values.shape[1] != len(schema.dimensions)):
            raise InvalidInput.field(TABLE, f"has not the {len(schema.dimensions)} fields of the schema")
        table = None if values is None else Table(schema, values)
        blank = torch.zeros(2, len(schema.dimensions), dtype=torch.float64)
        model = ResourceEncoder(spec.encoder, schema, blank, state["tool_vectors"], torch.Generator())
        model.load_state_dict(state)
        own = ("format", "spec", "schema", "tools", "inferred")
        about = {name: value for name, value in config.items() if name not in own}
        return ResourceCodec(spec, schema, model.to(device), about, table)


def _raise(wrong: Sequence[Violation]) -> None:
    """Raise :class:`InvalidInput` of these violations, if there are any."""
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidInput(f"{wrong[0].field}: {wrong[0].description}{more}", wrong)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _float(number: Any) -> float:
    """A number as floats have it: infinite where none is as large. One of fewer bits is taken as it is written."""
    if isinstance(number, np.floating) and number.itemsize < 8:
        return float(str(number))
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _shown(value: object) -> str:
    """A value in an error."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_reading = partial(reading, what="resource encoder")

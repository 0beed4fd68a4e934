"""Tables of measured configurations: read, checked, and held as vectors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.resource import FINEST, MAX_LABELS, MOST, Label, SchemaSpec, has_more_decimals
from services.language.tables import read_table
from services.resource.schema import Schema
from services.runtime.reading import reading
from services.runtime.seeds import generator


@dataclass(frozen=True)
class Table:
    """Measured configurations; the id of each is the number of its row."""

    schema: Schema
    values: Tensor
    """``[rows, fields]``, float64: numbers, and indices of labels."""

    @cached_property
    def tools(self) -> Tensor:
        """Index of each row's tool, ``[rows]``."""
        return self.values[:, 0].long()

    @cached_property
    def measured_tools(self) -> frozenset[int]:
        """Indices of the tools that have rows."""
        return frozenset(self.tools.tolist())

    def check_measured(self, tool: int, field: str) -> None:
        """Raise :class:`InvalidInput` of ``field`` for a ``tool`` without a row."""
        if tool not in self.measured_tools:
            text = f"there are no measurements of {self.schema.tools[tool]}"
            raise InvalidInput.field(field, f"{text}, and nothing can be predicted without any")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the schema and the values."""
        return hashlib.sha256(self.schema.digest.encode() + self.values.contiguous().numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.values)

    def at(self, rows: Tensor) -> Table:
        """The table of some rows."""
        return replace(self, values=self.values[rows])

    def within(self, rows: Tensor) -> Table:
        """This table with the ranges that were not declared taken from some ``rows`` alone."""
        dimensions = list(self.schema.spec.dimensions)
        for index, dimension in enumerate(dimensions):
            column = self.values[rows, index + 1]
            ends = {"low": float(column.min()), "high": float(column.max())}
            update = {end: value for end, value in ends.items() if f"{dimension.name}.{end}" in self.schema.inferred}
            dimensions[index] = dimension.model_copy(update=update)
        spec = self.schema.spec.model_copy(update={"dimensions": dimensions})
        return replace(self, schema=replace(self.schema, spec=spec))

    @cached_property
    def configurations(self) -> Tensor:
        """For each row the number of its configuration, ``[rows]``: rows that differ in measured dimensions alone have
        the same."""
        chosen = [index for index, dimension in enumerate(self.schema.dimensions) if not dimension.measured]
        numbers: Tensor = torch.unique(self.values[:, chosen], dim=0, return_inverse=True)[1]
        return numbers

    def warnings(self) -> list[str]:
        """For each measured number of which some values have more decimals than descriptions: a sentence that says
        how many."""
        texts = []
        for index, dimension in enumerate(self.schema.dimensions):
            values = self.values[:, index].tolist()
            finer = sum(has_more_decimals(value, dimension.decimals) for value in values)
            if dimension.number and finer:
                text = f"descriptions round {finer} of {len(self)} numbers to {dimension.decimals} decimals"
                more = "set its decimals for more" if dimension.decimals < FINEST else "take a smaller unit"
                texts.append(f"{dimension.name}: {text}; {more}")
        return texts

    def hold_out(self, share: float, seed: int) -> tuple[Tensor, Tensor]:
        """Rows to train on, and rows of a ``share`` of the configurations, but at least of one, which are in no
        training row. Raises :class:`InvalidInput` for a table of one configuration."""
        count = int(self.configurations.max()) + 1
        if count < 2:
            raise InvalidInput.field("spec.held_out", "there is only one configuration; set it to 0")
        order = torch.randperm(count, generator=generator(seed, "held-out"))
        held_out = torch.zeros(count, dtype=torch.bool)
        held_out[order[: min(max(1, round(share * count)), count - 1)]] = True
        mask = held_out[self.configurations]
        return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def read_tools(file: Path, field: str = "tools") -> tuple[str, ...]:
    """Names of the tools in a JSON list of objects with ``name``, of which the order counts. Raises
    :class:`InvalidInput`."""
    with reading(file.parent, file.name, "registry of tools", field):
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(entries, list) or not entries:
            raise InvalidInput.field(field, f"{file} is not a list of tools")
        names: list[str] = []
        for number, entry in enumerate(entries):
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not name.strip():
                raise InvalidInput.field(field, f"{file}: tool {number} has no name")
            if not _is_label(name):
                text = "no line break, tab or brace, and no white space at its ends"
                raise InvalidInput.field(field, f"{file}: tool {number}: {name!r} cannot stand in a text; take {text}")
            if name in names:
                raise InvalidInput.field(field, f"{file}: two tools have the name {name}")
            names.append(name)
        if len(names) > MAX_LABELS:
            raise InvalidInput.field(field, f"{file} has {len(names)} tools; at most {MAX_LABELS} are possible")
    return tuple(names)


def _is_label(name: str) -> bool:
    """Whether descriptions can have a name."""
    try:
        TypeAdapter(Label).validate_python(name)
    except ValidationError:
        return False
    return True


def read_measurements(
    file: Path,
    spec: SchemaSpec,
    tools: Sequence[str] | None = None,
    field: str = "profiling",
    *,
    every_tool: bool = True,
    inferred: frozenset[str] | None = None,
    advice: str = "",
) -> Table:
    """Read a table of measurements: a column of the tool and one of each dimension.

    ``tools``: the registry; None: the tools of the table, in the order of their first rows. ``every_tool``: whether
    there must be a row of each. ``inferred``: ends of the ranges in ``spec`` that nobody declared, as
    :attr:`Schema.inferred` has them, which numbers may be beyond; None: those that ``spec`` does not have. ``advice``
    ends an error about missing or unknown columns.

    Raises :class:`InvalidInput` that names the file, the row and the column: a missing or unknown column, a value that
    is not a finite number from 0 on or not one of the labels, a number outside its declared range, more decimals of
    a number that is not measured than descriptions have, a tool that is not in the registry or has no row, and a
    configuration that is there twice, unless the schema has repeated measurements.
    """
    columns = [dimension.column or dimension.name for dimension in spec.dimensions]
    model = _row_model(spec, columns, tools)
    rows: list[list[Any]] = []
    numbers: list[int] = []
    for number, row in read_table(file, model, field, advice):
        rows.append([getattr(row, f"field_{index}") for index in range(len(columns) + 1)])
        numbers.append(number)
    if not rows:
        raise InvalidInput.field(field, f"{file} has no rows")
    present = list(dict.fromkeys(row[0] for row in rows))
    if tools is not None and every_tool and (without := [tool for tool in tools if tool not in present]):
        raise InvalidInput.field(
            field, f"{file} has no row of the tool {without[0]}; measure it, or leave it out of the registry"
        )
    if len(present) > MAX_LABELS:
        raise InvalidInput.field(field, f"{file} has {len(present)} tools; at most {MAX_LABELS} are possible")
    _round(rows, spec, file, numbers, columns)
    inferred = _undeclared(spec) if inferred is None else inferred
    schema = Schema(_resolved(spec, rows), tuple(tools or present), inferred)
    labels = [dimension.labels for dimension in schema.dimensions]
    values = [
        [options.index(cell) if options else cell for cell, options in zip(row, labels, strict=True)] for row in rows
    ]
    table = Table(schema, torch.tensor(values, dtype=torch.float64))
    _check_ranges(table, file, numbers, columns)
    if not spec.repeated:
        first: dict[int, int] = {}
        for number, configuration in zip(numbers, table.configurations.tolist(), strict=True):
            if configuration in first:
                text = f"has the configuration of row {first[configuration]} again"
                hint = "remove one, or set table.repeated if they are repeated measurements"
                raise InvalidInput.field(f"{file.name}:{number}", f"{text}; {hint}")
            first[configuration] = number
    return table


def _row_model(spec: SchemaSpec, columns: Sequence[str], tools: Sequence[str] | None) -> type[BaseModel]:
    """The pydantic model of a row, with the fields ``field_0`` (the tool), ``field_1``, ..."""
    # Names of columns may be anything, those of attributes may not.
    kinds: list[Any] = [Label if tools is None else Literal[tuple(tools)]]
    for dimension in spec.dimensions:
        number = Annotated[float, Field(ge=0, le=MOST)]
        kinds.append(number if dimension.number else Literal[tuple(dimension.labels)])
    fields = {
        f"field_{index}": (kind, Field(alias=column))
        for index, (kind, column) in enumerate(zip(kinds, [spec.tool_column, *columns], strict=True))
    }
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("Row", __config__=config, **fields)  # type: ignore[call-overload, no-any-return]


def _resolved(spec: SchemaSpec, rows: Sequence[Sequence[Any]]) -> SchemaSpec:
    """``spec`` with the ends of every range: as declared, else of the levels, else of the rows."""
    dimensions = []
    for index, dimension in enumerate(spec.dimensions, 1):
        if dimension.number:
            known = dimension.levels or [row[index] for row in rows]
            low = min(known) if dimension.low is None else dimension.low
            high = max(known) if dimension.high is None else dimension.high
            dimension = dimension.model_copy(update={"low": float(low), "high": float(high)})
        dimensions.append(dimension)
    return spec.model_copy(update={"dimensions": dimensions})


def _undeclared(spec: SchemaSpec) -> frozenset[str]:
    """Ends of ranges that are not declared, neither themselves nor by levels."""
    ends = []
    for dimension in spec.dimensions:
        if dimension.number and not dimension.levels:
            pairs = ("low", dimension.low), ("high", dimension.high)
            ends += [f"{dimension.name}.{end}" for end, value in pairs if value is None]
    return frozenset(ends)


def _round(
    rows: Sequence[list[Any]], spec: SchemaSpec, file: Path, numbers: Sequence[int], columns: Sequence[str]
) -> None:
    """Take rounding errors of floating point away from what is not measured in ``rows``. Raise :class:`InvalidInput`
    for a number that has more decimals than descriptions, which would take it for another configuration."""
    for index, dimension in enumerate(spec.dimensions, 1):
        if not dimension.number or dimension.measured:
            continue
        for number, row in zip(numbers, rows, strict=True):
            if has_more_decimals(row[index], dimension.decimals):
                text = f"{row[index]:.15g} has more decimals than descriptions, {dimension.decimals}; set decimals"
                raise InvalidInput.field(f"{file.name}:{number}.{columns[index - 1]}", text)
            row[index] = round(row[index], dimension.decimals)


def _check_ranges(table: Table, file: Path, numbers: Sequence[int], columns: Sequence[str]) -> None:
    """Raise :class:`InvalidInput` for a number outside the declared range."""
    inferred = table.schema.inferred
    for index, dimension in enumerate(table.schema.dimensions):
        if not dimension.number:
            continue
        column, low, high = table.values[:, index], dimension.low or 0.0, dimension.high or 0.0
        low = 0.0 if f"{dimension.name}.low" in inferred else low
        high = math.inf if f"{dimension.name}.high" in inferred else high
        outside = ((column < low) | (column > high)).nonzero().flatten().tolist()
        if outside:
            ends = f"from {low:.10g} to {high:.10g}" if high < math.inf else f"from {low:.10g} on"
            text = f"{column[outside[0]]:.10g} is outside the declared range, {ends}"
            raise InvalidInput.field(f"{file.name}:{numbers[outside[0]]}.{columns[index - 1]}", text)

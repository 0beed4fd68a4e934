"""The cheapest configuration of a tool that stays below a bound, with the confidence asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.resource.codec import CHUNK, UNKNOWN, ResourceCodec
from services.resource.data import Table
from services.resource.export import named
from services.resource.predict import (
    NumberPredictor,
    measured_fields,
    measured_number,
    upper_bound,
)
from services.resource.schema import TOOL, Schema, step
from services.resource.texts import number_text


class Recommendation(NamedTuple):
    """A configuration, and what is known of it."""

    configuration: dict[str, Any]
    """Its fields by name, without measured ones."""
    price: float
    predicted: float
    """The measured dimension, as predicted."""
    upper: float
    """What it stays below with the confidence asked for."""
    fits: bool
    """Whether that is below the bound; if not, no configuration is, and this one comes closest."""
    outside: list[str]
    """The measured dimension where its prediction is outside the range of training; it is less certain there."""


class Choice(NamedTuple):
    """A recommended vector ``[fields]``, with measured dimensions 0; the rest as in :class:`Recommendation`."""

    values: Tensor
    price: float
    predicted: float
    upper: float
    fits: bool
    outside: bool
    """Whether the prediction is outside the range of training."""


class Options(NamedTuple):
    """The configurations of a tool that can be recommended."""

    values: Tensor
    """``[configurations, fields]``."""
    predicted: Tensor
    """Logarithm of 1 + the measured dimension in steps of its last decimal, ``[configurations]``."""
    prices: Tensor
    """``[configurations]``."""


class Recommender:
    """Recommends configurations from a table of which some, or all, were measured."""

    def __init__(
        self,
        codec: ResourceCodec,
        table: Table,
        dimension: str | None = None,
        *,
        raw: bool = False,
        calibration: float = 0.0,
        seed: int = 0,
    ) -> None:
        """``table``: measurements; ``dimension``: the measured dimension that is bounded, by default the first;
        ``raw``: use the raw numbers beside the embedding; ``calibration``: share of the configurations that is for
        confidence alone. Raises :class:`InvalidInput`."""
        self.codec, self.schema = codec, codec.schema
        self.dimension = self.schema.index(dimension, "dimension") if dimension else measured_number(self.schema)
        bounded = self.schema.dimensions[self.dimension]
        if not (bounded.measured and bounded.number):
            raise InvalidInput.field("dimension", f"{bounded.name} is not a measured number, which alone has a bound")
        self.table, self.measured = table, measured_fields(self.schema)
        predictor = NumberPredictor(codec, table, bounded.name, raw=raw, calibration=calibration, seed=seed)
        self.inputs, self.predictor = predictor.fitted(self.measured)
        self.candidates = grid(self.schema, table)
        self._options: dict[int, Options] = {}

    def recommend(
        self, given: Mapping[str, Any], bound: float, confidence: float = 0.9, field: str = "given"
    ) -> Recommendation:
        """The cheapest configuration with the ``given`` fields, the tool among them, whose measured dimension is below
        ``bound`` with this confidence; if there is none, the one that comes closest. Fields that are not given are
        chosen, also those without a price, which may describe the workload: give these.

        Raises :class:`InvalidInput` for fields that no configuration has, a bound that is not above 0, and a confidence
        outside (0, 1).
        """
        if TOOL not in given:
            raise InvalidInput.field(f"{field}.{TOOL}", "is missing")
        for dimension in self.schema.dimensions:
            if dimension.measured and given.get(dimension.name, UNKNOWN) not in (None, UNKNOWN):
                raise InvalidInput.field(f"{field}.{dimension.name}", "is measured, and cannot be chosen; leave it out")
        values, unknown = self.codec.vector(given, field)
        choice = self.choose(values, unknown, bound, confidence, field)
        configuration = named(self.schema, choice.values.tolist())
        for dimension in self.schema.dimensions:
            if dimension.measured:
                del configuration[dimension.name]
        outside = [self.schema.names[self.dimension]] if choice.outside else []
        return Recommendation(configuration, choice.price, choice.predicted, choice.upper, choice.fits, outside)

    def choose(
        self,
        values: Tensor,
        unknown: Tensor,
        bound: float,
        confidence: float = 0.9,
        field: str = "given",
        *,
        row: int | None = None,
    ) -> Choice:
        """:meth:`recommend` for a vector ``[fields]`` in which fields that are free are unknown; ``row``: its number in
        a batch, for errors."""
        if not 0 < bound < math.inf:
            raise InvalidInput.field("bound", f"must be a number above 0, not {bound:g}")
        behind = "" if row is None else f".{row}"
        self.table.check_measured(int(values[0]), f"{field}.{TOOL}{behind}")
        options = self._of_tool(int(values[0]))
        wanted = ~unknown & ~self.measured
        rows = (options.values[:, wanted] == values[wanted]).all(1).nonzero().flatten()
        if not len(rows):
            raise self._absent(values, wanted, options.values, field, behind)
        counts = step(self.schema.dimensions[self.dimension])
        upper = counts * upper_bound(options.predicted[rows], self.predictor.residuals, confidence, "confidence")
        best, fits = cheapest(options.prices[rows], upper, bound)
        found = rows[best]
        predicted = counts * float(options.predicted[found].expm1())
        outside = self.codec.is_outside(self.dimension, predicted)
        return Choice(options.values[found], float(options.prices[found]), predicted, float(upper[best]), fits, outside)

    def _absent(self, values: Tensor, wanted: Tensor, options: Tensor, field: str, row: str) -> InvalidInput:
        """The error for a vector of which no configuration has the ``wanted`` fields."""
        for index in wanted.nonzero().flatten().tolist():
            if values[index] not in options[:, index]:
                dimension = self.schema.dimensions[index]
                given, *levels = (
                    dimension.labels[int(level)] if dimension.labels else number_text(level, dimension.decimals)
                    for level in [float(values[index]), *torch.unique(options[:, index]).tolist()]
                )
                text = f"no configuration has {given}; there are {', '.join(levels)}"
                return InvalidInput.field(f"{field}.{dimension.name}{row}", text)
        return InvalidInput.field(field + row, "no configuration of the table has these values together")

    def _of_tool(self, tool: int) -> Options:
        """The configurations of a tool, predicted once."""
        if tool not in self._options:
            values = self.candidates[self.candidates[:, 0] == tool]
            predicted = [self.predictor.log_value(self.inputs(part)) for part in torch.split(values, CHUNK)]
            self._options[tool] = Options(values, torch.cat(predicted), prices(self.schema, values))
        return self._options[tool]


def prices(schema: Schema, values: Tensor) -> Tensor:
    """Price of each configuration of ``values`` ``[configurations, fields]``."""
    return values @ torch.tensor([dimension.price for dimension in schema.dimensions], dtype=torch.float64)


def cheapest(cost: Tensor, upper: Tensor, bound: float) -> tuple[int, bool]:
    """Index of the cheapest of some configurations whose ``upper`` is at most ``bound``, of several the one with the
    lowest, and True; if there is none, the one that comes closest, and False."""
    fits = upper <= bound
    score = torch.where(fits, cost, torch.inf) if bool(fits.any()) else upper
    best = int(torch.where(score == score.min(), upper, torch.inf).argmin())
    return best, bool(fits[best])


def grid(schema: Schema, table: Table) -> Tensor:
    """Every configuration of the levels and labels of each dimension, ``[configurations, fields]``, measured dimensions
    0; of a dimension without levels the values in the table, and where that makes too many, the table's rows alone."""
    options = []
    count = 1
    for index, dimension in enumerate(schema.dimensions):
        if dimension.measured:
            options.append([0.0])
        elif dimension.number:
            options.append(sorted(dimension.levels or set(table.values[:, index].tolist())))
        else:
            options.append([float(label) for label in range(len(dimension.labels))])
        count *= len(options[-1])
    if count > MOST_CONFIGURATIONS:
        rows: Tensor = torch.unique(table.values.masked_fill(measured_fields(schema), 0.0), dim=0)
        return rows
    return torch.tensor(list(itertools.product(*options)), dtype=torch.float64)


MOST_CONFIGURATIONS = 200_000
"""Configurations of a grid that are compared."""

"""The cheapest configuration of a tool that stays below a bound, with the confidence asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.export import fields
from services.resource.predict import Predictor, fit
from services.resource.schema import TOOL, Schema


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


class Recommender:
    """Recommends configurations from a table of which some, or all, were measured."""

    def __init__(
        self, codec: ResourceCodec, table: Table, dimension: str | None = None, *, raw: bool = False, seed: int = 0
    ) -> None:
        """``table``: measurements; ``dimension``: the measured dimension that is bounded, by default the first;
        ``raw``: use the raw numbers beside the embedding. Raises :class:`InvalidInput`."""
        self.codec, self.schema, self.raw = codec, codec.schema, raw
        self.dimension = self.schema.index(dimension, "dimension") if dimension else measured_number(self.schema)
        numbers = table.values[:, self.dimension]
        self.predictor: Predictor = fit(self.features(table.values), numbers, seed, table.configurations)
        self.candidates = grid(self.schema, table)

    def features(self, values: Tensor) -> Tensor:
        """Features of vectors ``[rows, fields]`` in which all measured dimensions are unknown, ``[rows, features]``."""
        unknown = torch.tensor([dimension.measured for dimension in self.schema.dimensions]).expand(len(values), -1)
        embeddings = self.codec.embed(values, unknown)
        if not self.raw:
            return embeddings
        chosen = [index for index, dimension in enumerate(self.schema.dimensions) if not dimension.measured]
        return torch.cat([embeddings, values[:, chosen].log1p().float()], 1)

    def recommend(
        self, given: Mapping[str, Any], bound: float, confidence: float = 0.9, field: str = "given"
    ) -> Recommendation:
        """The cheapest configuration with the ``given`` fields, the tool among them, whose measured dimension is below
        ``bound`` with this confidence; if there is none, the one that comes closest.

        Raises :class:`InvalidInput` for fields that no configuration has, a bound that is not above 0, and a confidence
        outside (0, 1).
        """
        if not bound > 0:
            raise InvalidInput.field("latency", f"must be above 0, not {bound:g}")
        if TOOL not in given:
            raise InvalidInput.field(f"{field}.{TOOL}", "is missing")
        values, unknown = self.codec.vectors([{**dict.fromkeys(self.schema.names), **given}], field)
        wanted = ~unknown[0] & ~torch.tensor([dimension.measured for dimension in self.schema.dimensions])
        rows = self.candidates[(self.candidates[:, wanted] == values[0, wanted]).all(1)]
        if not len(rows):
            raise InvalidInput.field(field, "no configuration of the table's grid has these values")
        features = self.features(rows)
        upper = self.predictor.upper(features, confidence)
        prices = torch.tensor(
            [self.schema.price(dict(zip(self.schema.names, row, strict=True))) for row in rows.tolist()]
        )
        fits = upper <= bound
        score = torch.where(fits, prices.double(), torch.inf) if bool(fits.any()) else upper
        best = int(score.argmin())
        named = fields(self.schema, rows[best].tolist())
        for dimension in self.schema.dimensions:
            if dimension.measured:
                del named[dimension.name]
        predicted = float(self.predictor.log_value(features[best : best + 1]).expm1())
        return Recommendation(named, float(prices[best]), predicted, float(upper[best]), bool(fits[best]))


def measured_number(schema: Schema) -> int:
    """Index of the first measured number. Raises :class:`InvalidInput` for a schema without one."""
    for index, dimension in enumerate(schema.dimensions):
        if dimension.measured and dimension.number:
            return index
    raise InvalidInput.field("dimension", "the schema has no measured number; set `measured` of the one to predict")


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
        measured = torch.tensor([dimension.measured for dimension in schema.dimensions])
        rows: Tensor = torch.unique(table.values.masked_fill(measured, 0.0), dim=0)
        return rows
    return torch.tensor(list(itertools.product(*options)), dtype=torch.float64)


MOST_CONFIGURATIONS = 200_000
"""Configurations of a grid that are compared."""

"""Prediction of a dimension from embeddings in which it is unknown, with intervals, and recommendations on top.

The predictor is kernel ridge regression of the logarithm: a linear kernel, which extrapolates, plus a Gaussian one;
cross-validation chooses their weights. Intervals are conformal: quantiles of the absolute residuals of rows that the
prediction did not use, each left out in turn, so that they cover at the level asked for whatever the model is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ethogram.errors import InvalidInput
from services.resource.codec import UNKNOWN, ResourceCodec
from services.resource.data import Table
from services.resource.schema import TOOL, Schema
from services.runtime.seeds import generator

FEWEST = 10
"""Fewest configurations to predict from."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Widths of the Gaussian kernel, as multiples of the median distance of two rows."""
SHARES = (0.0, 0.1, 0.5)
"""Weights of the Gaussian kernel beside the linear one."""
MOST_ROWS = 4000
"""Rows that a predictor is fitted on; of more, a random part."""
FOLDS = 10
"""Parts of the rows, each of which is predicted from the others for the intervals."""
CHOICE_ROWS = 600
"""Rows on which the kernel is chosen; of more, a random part. The ridge is chosen on all."""


class Interval(NamedTuple):
    """Predictions with their ends, each ``[rows]``."""

    value: Tensor
    low: Tensor
    high: Tensor


class Kernel(NamedTuple):
    """A linear kernel and ``share`` of a Gaussian one of ``width``."""

    share: float
    width: float

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        linear = first @ second.T / first.shape[1]
        if not self.share:
            return linear
        distance = torch.cdist(first, second).square() / first.shape[1]
        return linear + self.share * torch.exp(-distance / (2 * self.width**2))


@dataclass(frozen=True)
class Regression:
    """Kernel ridge regression of the logarithm of 1 + a number on features ``[rows, features]``."""

    mean: Tensor
    deviation: Tensor
    center: float
    rows: Tensor
    """Standardised features of the rows it was fitted on."""
    weights: Tensor
    kernel: Kernel

    def __call__(self, features: Tensor) -> Tensor:
        """The predicted logarithms, ``[rows]``."""
        scaled = (features.double() - self.mean) / self.deviation
        return self.center + self.kernel(scaled, self.rows) @ self.weights


@dataclass(frozen=True)
class Predictor:
    """Predicts one number from features; see :func:`fit`."""

    regression: Regression
    residuals: Tensor
    """Of the logarithm, of rows that were predicted without them, ``[measurements]``."""
    measurements: int
    """Rows that it was fitted on."""

    def log_value(self, features: Tensor) -> Tensor:
        """The predicted logarithm of 1 + the number, ``[rows]``, from features ``[rows, features]``."""
        return self.regression(features)

    def interval(self, features: Tensor, level: float) -> Interval:
        """Predictions with intervals at ``level``; raises as :func:`interval` does."""
        return interval(self.log_value(features), self.residuals, level)


def interval(log_value: Tensor, residuals: Tensor, level: float) -> Interval:
    """Predictions ``[rows]`` of the logarithm of 1 + a number, as intervals at ``level``; ``residuals`` are of the
    logarithm. Raises :class:`InvalidInput` for a level outside (0, 1), and for one that takes more residuals."""
    margin = quantile(residuals.abs(), level)
    low, high = ((log_value + sign * margin).expm1().clamp_min(0) for sign in (-1, 1))
    return Interval(log_value.expm1().clamp_min(0), low, high)


def upper_bound(log_value: Tensor, residuals: Tensor, level: float, field: str = "level") -> Tensor:
    """What the numbers stay below at ``level``, as :func:`interval`; ``field``: where the level was named, for
    errors."""
    return (log_value + quantile(residuals, level, field)).expm1().clamp_min(0)


def quantile(residuals: Tensor, level: float, field: str = "level") -> float:
    """The conformal quantile of ``n`` residuals: the one of rank ``ceil((n + 1) level)``."""
    if not 0 < level < 1:
        raise InvalidInput.field(field, f"must be between 0 and 1, not {level:g}")
    rank = math.ceil((len(residuals) + 1) * level)
    if rank > len(residuals):
        least = math.ceil(level / (1 - level))
        raise InvalidInput.field(
            field, f"{level:g} takes at least {least} measurements, and there are {len(residuals)}"
        )
    return float(residuals.sort().values[rank - 1])


def fit(features: Tensor, numbers: Tensor, seed: int = 0, groups: Tensor | None = None) -> Predictor:
    """Fit a predictor of ``numbers`` ``[rows]`` from ``features`` ``[rows, features]``; of more than :data:`MOST_ROWS`
    rows on a random part.

    ``groups``: rows that are left out together, e.g. repeated measurements. Raises
    :class:`InvalidInput` for fewer than :data:`FEWEST` groups.
    """
    groups = torch.arange(len(numbers)) if groups is None else torch.unique(groups, return_inverse=True)[1]
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < FEWEST:
        raise InvalidInput.field("table", f"has {count} measured configurations; a prediction takes at least {FEWEST}")
    if len(numbers) > MOST_ROWS:
        kept = torch.randperm(len(numbers), generator=generator(seed, "rows"))[:MOST_ROWS]
        features, numbers, groups = features[kept], numbers[kept], groups[kept]
    target, x = numbers.double().log1p(), features.double()
    residuals = torch.empty_like(target)
    fold = (torch.randperm(count, generator=generator(seed, "folds")) % FOLDS)[groups]
    for number in range(FOLDS):
        rows, others = fold == number, fold != number
        residuals[rows] = target[rows] - _regression(x[others], target[others], groups[others], seed)(x[rows])
    return Predictor(_regression(x, target, groups, seed), residuals, len(target))


def _regression(x: Tensor, target: Tensor, groups: Tensor, seed: int) -> Regression:
    """The regression of ``target`` ``[rows]`` on ``x`` ``[rows, features]`` with the least error of groups that are
    left out."""
    mean, deviation = x.mean(0), x.std(0)
    # What never varies says nothing.
    deviation = torch.where(deviation > 1e-9, deviation, torch.inf)
    x, center = (x - mean) / deviation, float(target.mean())
    order = torch.randperm(len(x), generator=generator(seed, "distances"))
    median = float(torch.pdist(x[order[:500]]).median()) / x.shape[1] ** 0.5
    kernels = [Kernel(share, width * median) for share in SHARES for width in (WIDTHS if share else WIDTHS[:1])]
    if len(x) > CHOICE_ROWS:
        part = order[:CHOICE_ROWS]
        kernels = [_choose(kernels, x[part], target[part] - center, groups[part])[0]]
    kernel, ridge, _ = _choose(kernels, x, target - center, groups)
    gram = kernel(x, x) + ridge * torch.eye(len(x), dtype=x.dtype)
    return Regression(mean, deviation, center, x, torch.linalg.solve(gram, target - center), kernel)


def _choose(kernels: Sequence[Kernel], x: Tensor, target: Tensor, groups: Tensor) -> tuple[Kernel, float, Tensor]:
    """Kernel and ridge with the least error on groups of rows that are left out, and the residuals of these."""
    numbers, sizes = torch.unique(groups, return_counts=True)
    # Where each row is a group of its own there is nothing to solve.
    members = [(groups == number).nonzero().flatten() for number in numbers] if int(sizes.max()) > 1 else []
    best: tuple[float, Kernel, float, Tensor] | None = None
    for kernel in kernels:
        values, vectors = torch.linalg.eigh(kernel(x, x))
        turned = vectors.T @ target
        for ridge in RIDGES:
            inverse = 1 / (values.clamp_min(0) + ridge)
            residuals = _left_out(vectors, inverse, vectors @ (inverse * turned), members)
            error = float(residuals.abs().mean())
            if best is None or error < best[0]:
                best = error, kernel, ridge, residuals
    assert best is not None
    return best[1:]


def features(codec: ResourceCodec, values: Tensor, unknown: Tensor, *, raw: bool = False) -> Tensor:
    """What a number is predicted from: embeddings of vectors ``[rows, fields]``, float64 ``[rows, features]``.

    ``raw``: also the known numbers, as logarithms, and an indicator of each known label.
    """
    columns = [codec.embed(values, unknown).double()]
    if raw:
        for index, dimension in enumerate(codec.schema.dimensions):
            hidden, column = unknown[:, index : index + 1], values[:, index].masked_fill(unknown[:, index], 0.0)
            labels = len(dimension.labels)
            block = nn.functional.one_hot(column.long(), labels).double() if labels else column.log1p().unsqueeze(1)
            columns.append(block.masked_fill(hidden, 0.0))
    return torch.cat(columns, 1)


class Prediction(NamedTuple):
    """A predicted number of a configuration."""

    dimension: str
    value: float
    low: float
    high: float
    """Ends of the interval."""
    outside: list[str]
    """Numbers outside the range of training, for which intervals need not hold."""
    measurements: int
    """Rows of the table that it was predicted from."""


class NumberPredictor:
    """Predicts one number of configurations from embeddings in which it is unknown, learning from a table."""

    def __init__(
        self, codec: ResourceCodec, table: Table, dimension: str | None = None, *, raw: bool = False, seed: int = 0
    ) -> None:
        """``dimension``: by default the first measured number; ``raw``: use the raw numbers beside the embedding.
        Raises :class:`InvalidInput` for a dimension that is not a number of the schema."""
        self.codec, self.table, self.raw, self.seed = codec, table, raw, seed
        self.dimension = codec.schema.index(dimension) if dimension else measured_number(codec.schema)
        if not codec.schema.dimensions[self.dimension].number:
            text = f"{dimension} is a category; numbers alone are predicted"
            raise InvalidInput.field("dimension", text)
        self._fitted: dict[tuple[bool, ...], Predictor] = {}

    def predict(self, given: Mapping[str, Any], level: float = 0.9, field: str = "given") -> Prediction:
        """The number of the configuration with the ``given`` fields, and an interval that covers it with probability
        ``level``.

        Raises :class:`InvalidInput` for fields that the schema does not have, a tool without measurements, the number
        itself among the fields, and a level outside (0, 1).
        """
        name = self.codec.schema.names[self.dimension]
        if given.get(name, UNKNOWN) not in (None, UNKNOWN):
            raise InvalidInput.field(f"{field}.{name}", "is what is predicted; leave it out, or give unknown")
        values, unknown = self.codec.vectors([{**given, name: UNKNOWN}], field)
        interval = self.intervals(values, unknown, level, field)
        value, low, high = (float(end) for end in interval)
        measurements = self._predictor(unknown[0]).measurements
        return Prediction(name, value, low, high, self.codec.outside(values, unknown)[0], measurements)

    def intervals(self, values: Tensor, unknown: Tensor, level: float = 0.9, field: str = "rows") -> Interval:
        """Predictions for vectors ``[rows, fields]``, with intervals at ``level``. Raises :class:`InvalidInput`."""
        check_measured(self.table, values, field)
        unknown = unknown.clone()
        unknown[:, self.dimension] = True
        patterns, place = torch.unique(unknown, dim=0, return_inverse=True)
        ends = torch.empty(3, len(values), dtype=torch.float64)
        for index, pattern in enumerate(patterns):
            rows = place == index
            inputs = features(self.codec, values[rows], unknown[rows], raw=self.raw)
            ends[:, rows] = torch.stack(list(self._predictor(pattern).interval(inputs, level)))
        return Interval(*ends)

    def _predictor(self, unknown: Tensor) -> Predictor:
        """The predictor of vectors in which the fields ``unknown`` ``[fields]`` are not known."""
        key = tuple(unknown.tolist())
        if key not in self._fitted:
            values = self.table.values
            inputs = features(self.codec, values, unknown.expand(len(values), -1), raw=self.raw)
            self._fitted[key] = fit(inputs, values[:, self.dimension], self.seed, self.table.configurations)
        return self._fitted[key]


def check_measured(table: Table, values: Tensor, field: str) -> None:
    """Raise :class:`InvalidInput` for a tool of ``values`` ``[rows, fields]`` of which the table has no row."""
    if absent := [int(tool) for tool in values[:, 0].tolist() if int(tool) not in table.measured_tools]:
        text = f"there are no measurements of {table.schema.tools[absent[0]]}, and nothing can be predicted without any"
        raise InvalidInput.field(f"{field}.{TOOL}", text)


def measured_fields(schema: Schema) -> Tensor:
    """Which fields of a vector are measured, ``[fields]``."""
    return torch.tensor([dimension.measured for dimension in schema.dimensions])


def measured_number(schema: Schema) -> int:
    """Index of the first measured number. Raises :class:`InvalidInput` for a schema without one."""
    for index, dimension in enumerate(schema.dimensions):
        if dimension.measured and dimension.number:
            return index
    raise InvalidInput.field("dimension", "the schema has no measured number; set `measured` of the one to predict")


def _left_out(vectors: Tensor, inverse: Tensor, weights: Tensor, members: Sequence[Tensor]) -> Tensor:
    """Residuals of each group of rows when it is left out of kernel ridge regression: ``A_gg^-1 w_g``, with the inverse
    ``A`` of the kernel matrix plus the ridge and the weights ``w`` (Rasmussen & Williams 2006, equation 5.12)."""
    if not members:
        return weights / ((vectors.square() * inverse).sum(1))
    residuals = torch.empty_like(weights)
    for rows in members:
        block = (vectors[rows] * inverse) @ vectors[rows].T
        residuals[rows] = torch.linalg.solve(block, weights[rows])
    return residuals

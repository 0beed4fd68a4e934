"""Prediction of a dimension from embeddings in which it is unknown, with intervals, and recommendations on top.

The predictor is kernel ridge regression of the logarithm: a linear kernel, which extrapolates, plus a Gaussian one;
cross-validation chooses their weights. It is on the fields of the configuration as they are read from the embedding,
which takes no measurements to learn. What else the embedding has, the encoder learned from the measurements that it was
trained on; residuals of these would be too small.

Intervals are conformal by cross-validation (the jackknife of arXiv 1905.02928): quantiles of the residuals of
measurements, each by a regression that used neither the measurement nor others of its configuration, with a kernel and
a ridge that were chosen without it. They cover about as asked if new configurations are exchangeable with measured
ones. No finite number of measurements guarantees it; with ``calibration`` it is guaranteed, at the cost of accuracy: a
share of the configurations is not learned from, and quantiles are those of its residuals (split conformal prediction,
arXiv 1604.04173). The report of a run shows what intervals cover of configurations that its encoder has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.resource.codec import UNKNOWN, ResourceCodec
from services.resource.data import Table
from services.resource.schema import TOOL, Schema, step
from services.runtime.seeds import generator

FEWEST = 10
"""Fewest configurations to predict from."""
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
WIDTHS = (1.0, 2.0, 4.0)
"""Widths of the Gaussian kernel, as multiples of the median distance of two rows."""
SHARES = (0.1, 0.5)
"""Weights of the Gaussian kernel beside the linear one, which is tried alone, too."""
MOST_ROWS = 4000
"""Rows that a predictor is fitted on; of more, a random part."""
FOLDS = 5
"""Parts of the rows; kernel and ridge are chosen without each of them for the residuals in it."""
CHOICE_ROWS = 300
"""Rows on which kernel and ridge are chosen; of more, a random part."""
PROBED = 2000
"""Random configurations whose embeddings show how fields are read from embeddings."""
FEW = 16
"""Most values of a number in the table for each to have an indicator."""
CONSTANT = 100.0
"""Constant in the kernel, which makes for an intercept that the ridge hardly shrinks."""


class Interval(NamedTuple):
    """Predictions with their ends, each ``[rows]``."""

    value: Tensor
    low: Tensor
    high: Tensor


class Kernel(NamedTuple):
    """A constant, a linear kernel and ``share`` of a Gaussian one of ``width``."""

    share: float
    width: float

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        linear = CONSTANT + first @ second.T / first.shape[1]
        if not self.share:
            return linear
        distance = torch.cdist(first, second).square() / first.shape[1]
        return linear + self.share * torch.exp(-distance / (2 * self.width**2))


class Choice(NamedTuple):
    """A kernel, and what is added to the diagonal of its matrix."""

    kernel: Kernel
    ridge: float


@dataclass(frozen=True)
class Regression:
    """Kernel ridge regression on features ``[rows, features]``."""

    mean: Tensor
    deviation: Tensor
    rows: Tensor
    """Standardised features of the rows it was fitted on."""
    weights: Tensor
    kernel: Kernel

    @staticmethod
    def of(features: Tensor, targets: Tensor, choice: Choice) -> Regression:
        """The regression of ``targets`` ``[rows]`` or ``[rows, targets]``."""
        mean, deviation = _scale(features)
        x = (features - mean) / deviation
        gram = choice.kernel(x, x) + choice.ridge * torch.eye(len(x), dtype=x.dtype)
        return Regression(mean, deviation, x, torch.linalg.solve(gram, targets), choice.kernel)

    def __call__(self, features: Tensor) -> Tensor:
        """The predictions, of the shape of the targets."""
        scaled = (features.double() - self.mean) / self.deviation
        return self.kernel(scaled, self.rows) @ self.weights


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


def fit(
    features: Tensor, numbers: Tensor, seed: int = 0, groups: Tensor | None = None, *, calibration: float = 0.0
) -> Predictor:
    """Fit a predictor of ``numbers`` ``[rows]`` from ``features`` ``[rows, features]``; of more than :data:`MOST_ROWS`
    rows a random part is used.

    ``groups``: rows that are left out together, e.g. repeated measurements; ``calibration``: share of the groups of
    which the residuals are, and on which nothing else is fitted; 0: all are used for both. Raises
    :class:`InvalidInput` for fewer than :data:`FEWEST` groups, and for a share outside [0, 1).
    """
    if not 0 <= calibration < 1:
        raise InvalidInput.field("calibration", f"must be from 0 to below 1, not {calibration:g}")
    groups = torch.arange(len(numbers)) if groups is None else torch.unique(groups, return_inverse=True)[1]
    count = int(groups.max()) + 1 if len(groups) else 0
    if count < FEWEST:
        raise InvalidInput.field("table", f"has {count} measured configurations; a prediction takes at least {FEWEST}")
    if len(numbers) > MOST_ROWS:
        kept = torch.randperm(len(numbers), generator=generator(seed, "rows"))[:MOST_ROWS]
        features, numbers, groups = features[kept], numbers[kept], groups[kept]
    target, features = numbers.double().log1p(), features.double()
    if calibration:
        kept_apart = torch.randperm(count, generator=generator(seed, "calibration"))[: math.ceil(calibration * count)]
        calibrates = torch.isin(groups, kept_apart)
        learned = fit(features[~calibrates], numbers[~calibrates], seed, groups[~calibrates])
        errors = target[calibrates] - learned.log_value(features[calibrates])
        return replace(learned, residuals=errors, measurements=len(target))
    mean, deviation = _scale(features)
    x = (features - mean) / deviation
    order = torch.randperm(len(x), generator=generator(seed, "rows to choose on"))
    kernels = _kernels(x[order])
    choice = _choose(x, target, groups, order, kernels)
    fold = (torch.randperm(count, generator=generator(seed, "folds")) % FOLDS)[groups]
    residuals = torch.empty_like(target)
    known: dict[Choice, Tensor] = {}
    for number in range(FOLDS):
        without = _choose(x, target, groups, order[fold[order] != number], kernels)
        if without not in known:
            known[without] = _Spectrum.of(without.kernel, x, groups).residuals(target, without.ridge)
        residuals[fold == number] = known[without][fold == number]
    return Predictor(Regression.of(features, target, choice), residuals, len(target))


def _scale(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features ``[rows, features]``; what never varies says nothing."""
    deviation = features.std(0)
    return features.mean(0), torch.where(deviation > 1e-9, deviation, torch.inf)


def _median_distance(x: Tensor) -> float:
    """Median distance of two rows of ``x``, by the root of the number of features."""
    distances = torch.pdist(x[:500])
    # Where little is known most rows, or all, may be the same.
    typical = float(distances.median()) or float(distances.mean()) or 1.0
    return typical / math.sqrt(x.shape[1])


def _kernels(x: Tensor) -> list[Kernel]:
    """The kernels that are compared. ``x``: standardised features ``[rows, features]``, in random order."""
    median = _median_distance(x)
    return [Kernel(0.0, median), *(Kernel(share, width * median) for share in SHARES for width in WIDTHS)]


def _choose(x: Tensor, target: Tensor, groups: Tensor, order: Tensor, kernels: Sequence[Kernel]) -> Choice:
    """Kernel and ridge with the least error of groups that are left out, on the first rows of ``order``. ``x``:
    standardised features ``[rows, features]``."""
    rows = order[:CHOICE_ROWS]
    x, target, groups = x[rows], target[rows], groups[rows]
    best: tuple[float, Choice] | None = None
    for kernel in kernels:
        spectrum = _Spectrum.of(kernel, x, groups)
        for ridge in RIDGES:
            error = float(spectrum.residuals(target, ridge).abs().mean())
            if best is None or error < best[0]:
                best = error, Choice(kernel, ridge)
    assert best is not None
    return best[1]


class _Spectrum(NamedTuple):
    """The matrix of a kernel on some rows."""

    values: Tensor
    vectors: Tensor
    groups: Tensor

    @staticmethod
    def of(kernel: Kernel, x: Tensor, groups: Tensor) -> _Spectrum:
        values, vectors = torch.linalg.eigh(kernel(x, x))
        return _Spectrum(values.clamp_min(0), vectors, groups)

    def residuals(self, target: Tensor, ridge: float) -> Tensor:
        """Residuals of each group of rows when it is left out of kernel ridge regression: ``A_gg^-1 w_g``, with the
        inverse ``A`` of the kernel matrix plus the ridge and the weights ``w`` (Rasmussen & Williams 2006, equation
        5.12)."""
        inverse = 1 / (self.values + ridge)
        weights = self.vectors @ (inverse * (self.vectors.T @ target))
        numbers, sizes = torch.unique(self.groups, return_counts=True)
        if int(sizes.max()) == 1:
            # Where each row is a group of its own there is nothing to solve.
            return weights / (self.vectors.square() @ inverse)
        residuals = torch.empty_like(weights)
        for number in numbers:
            rows = self.groups == number
            block = (self.vectors[rows] * inverse) @ self.vectors[rows].T
            residuals[rows] = torch.linalg.solve(block, weights[rows])
        return residuals


class Inputs:
    """What a number is predicted from: features of vectors in which the same fields are unknown.

    They are the fields that are known: an indicator of each label and of each value of a number that has few, and
    logarithms of numbers. They are read from the embedding, by a regression on embeddings of random configurations;
    with ``raw`` those of the vector itself stand beside them.
    """

    def __init__(
        self, codec: ResourceCodec, table: Table, unknown: Tensor, *, raw: bool = False, seed: int = 0
    ) -> None:
        """``table``: whose values the random configurations have; ``unknown``: which fields are, ``[fields]``."""
        self.codec, self.unknown, self.raw = codec, unknown, raw
        self._levels = [torch.unique(column) for column in table.values.T]
        rng = generator(seed, "random configurations")
        drawn = [column[torch.randint(len(column), (PROBED,), generator=rng)] for column in table.values.T]
        configurations = torch.stack(drawn, 1)
        embeddings = self._embed(configurations)
        mean, deviation = _scale(embeddings)
        width = 2 * _median_distance((embeddings - mean) / deviation)
        fields = self._fields(configurations)
        self._is_indicator = ((fields == 0) | (fields == 1)).all(0)
        self._read = Regression.of(embeddings, fields, Choice(Kernel(0.5, width), 1e-5))

    def __call__(self, values: Tensor) -> Tensor:
        """Features of vectors ``[rows, fields]``, float64 ``[rows, features]``."""
        read = self._read(self._embed(values))
        # What is one of a few values was read right, or not at all.
        read = torch.where(self._is_indicator, (read > 0.5).double(), read)
        return torch.cat([read, self._fields(values)], 1) if self.raw else read

    def _embed(self, values: Tensor) -> Tensor:
        return self.codec.embed(values, self.unknown.expand(len(values), -1)).double()

    def _fields(self, values: Tensor) -> Tensor:
        columns = []
        for index, dimension in enumerate(self.codec.schema.dimensions):
            column, levels = values[:, index : index + 1], self._levels[index]
            if self.unknown[index]:
                continue
            if dimension.number:
                columns.append((column / step(dimension)).log1p())
            if not dimension.number or len(levels) <= FEW:
                columns.append((column == levels).double())
        return torch.cat(columns, 1)


class Prediction(NamedTuple):
    """A predicted number of a configuration."""

    dimension: str
    value: float
    low: float
    high: float
    """Ends of the interval."""
    outside: list[str]
    """Numbers outside the range of training, for which intervals need not hold; the predicted one may be of them."""
    measurements: int
    """Rows of the table that it was predicted from."""


class NumberPredictor:
    """Predicts one number of configurations from embeddings in which it is unknown, learning from a table."""

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
        """``dimension``: by default the first measured number; ``raw``: use the raw numbers beside the embedding;
        ``calibration``: share of the configurations that is for intervals alone. Raises :class:`InvalidInput` for a
        dimension that is not a number of the schema."""
        self.codec, self.table, self.raw, self.calibration, self.seed = codec, table, raw, calibration, seed
        self.dimension = codec.schema.index(dimension) if dimension else measured_number(codec.schema)
        if not codec.schema.dimensions[self.dimension].number:
            text = f"{dimension} is a category; numbers alone are predicted"
            raise InvalidInput.field("dimension", text)
        self._fitted: dict[tuple[bool, ...], tuple[Inputs, Predictor]] = {}

    def predict(self, given: Mapping[str, Any], level: float = 0.9, field: str = "given") -> Prediction:
        """The number of the configuration with the ``given`` fields, and an interval that covers it with probability
        ``level``.

        Raises :class:`InvalidInput` for fields that the schema does not have, a tool without measurements, the number
        itself among the fields, and a level outside (0, 1).
        """
        name = self.codec.schema.names[self.dimension]
        if given.get(name, UNKNOWN) not in (None, UNKNOWN):
            raise InvalidInput.field(f"{field}.{name}", "is what is predicted; leave it out, or give unknown")
        values, unknown = (part.unsqueeze(0) for part in self.codec.vector({**given, name: UNKNOWN}, field))
        self.table.check_measured(int(values[0, 0]), f"{field}.{TOOL}")
        interval = self.intervals(values, unknown, level, field)
        value, low, high = (float(end) for end in interval)
        measurements = self.fitted(unknown[0])[1].measurements
        outside = self.codec.outside(values, unknown)[0]
        if self.codec.is_outside(self.dimension, value):
            outside.append(name)
        return Prediction(name, value, low, high, outside, measurements)

    def intervals(self, values: Tensor, unknown: Tensor, level: float = 0.9, field: str = "rows") -> Interval:
        """Predictions for vectors ``[rows, fields]``, with intervals at ``level``. Raises :class:`InvalidInput`."""
        for row, tool in enumerate(values[:, 0].tolist()):
            self.table.check_measured(int(tool), f"{field}.{row}.{TOOL}")
        unknown = unknown.clone()
        unknown[:, self.dimension] = True
        patterns, pattern_of = torch.unique(unknown, dim=0, return_inverse=True)
        ends = torch.empty(3, len(values), dtype=torch.float64)
        for index, pattern in enumerate(patterns):
            rows = pattern_of == index
            inputs, predictor = self.fitted(pattern)
            ends[:, rows] = torch.stack(list(predictor.interval(inputs(values[rows]), level)))
        return Interval(*(ends * step(self.codec.schema.dimensions[self.dimension])))

    def fitted(self, unknown: Tensor) -> tuple[Inputs, Predictor]:
        """The predictor of vectors in which the fields ``unknown`` ``[fields]`` are not known, and its inputs."""
        key = tuple(unknown.tolist())
        if key not in self._fitted:
            table = self.table
            inputs = Inputs(self.codec, table, unknown, raw=self.raw, seed=self.seed)
            numbers = table.values[:, self.dimension] / step(table.schema.dimensions[self.dimension])
            predictor = fit(
                inputs(table.values), numbers, self.seed, table.configurations, calibration=self.calibration
            )
            self._fitted[key] = inputs, predictor
        return self._fitted[key]


def measured_fields(schema: Schema) -> Tensor:
    """Which fields of a vector are measured, ``[fields]``."""
    return torch.tensor([dimension.measured for dimension in schema.dimensions])


def measured_number(schema: Schema) -> int:
    """Index of the first measured number. Raises :class:`InvalidInput` for a schema without one."""
    for index, dimension in enumerate(schema.dimensions):
        if dimension.measured and dimension.number:
            return index
    raise InvalidInput.field("dimension", "the schema has no measured number; set `measured` of the one to predict")

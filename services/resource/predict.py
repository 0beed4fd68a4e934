"""Prediction of a dimension from embeddings in which it is unknown, with intervals, and recommendations on top.

The predictor is kernel ridge regression of the logarithm: a linear kernel, which extrapolates, plus a Gaussian one;
cross-validation chooses their weights. Intervals are conformal: quantiles of the absolute residuals of rows that the
prediction did not use, each left out in turn, so that they cover at the level asked for whatever the model is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
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
class Predictor:
    """Predicts one number from features ``[rows, features]``; see :func:`fit`."""

    mean: Tensor
    deviation: Tensor
    center: float
    rows: Tensor
    """Standardised features of the rows it was fitted on."""
    weights: Tensor
    kernel: Kernel
    residuals: Tensor
    """Sorted residuals, in the logarithm, of rows that were predicted without them, ``[rows]``."""

    def log_value(self, features: Tensor) -> Tensor:
        """The predicted logarithm of 1 + the number."""
        scaled = (features.double() - self.mean) / self.deviation
        return self.center + self.kernel(scaled, self.rows) @ self.weights

    def interval(self, features: Tensor, level: float) -> Interval:
        """Predictions, and intervals that cover the measured number with probability ``level``. Raises
        :class:`InvalidInput` for a level outside (0, 1), and for one that takes more measurements than there were."""
        value = self.log_value(features)
        margin = quantile(self.residuals.abs(), level)
        low, high = ((value + sign * margin).expm1().clamp_min(0) for sign in (-1, 1))
        return Interval(value.expm1().clamp_min(0), low, high)

    def upper(self, features: Tensor, level: float) -> Tensor:
        """Bounds that the measured number stays below with probability ``level``."""
        return self.upper_of(self.log_value(features), level)

    def upper_of(self, log_value: Tensor, level: float, field: str = "level") -> Tensor:
        """:meth:`upper` of what :meth:`log_value` predicted; ``field``: where the level was named, for errors."""
        return (log_value + quantile(self.residuals, level, field)).expm1().clamp_min(0)


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
    """Fit a predictor of ``numbers`` ``[rows]`` from ``features`` ``[rows, features]``.

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
    target = numbers.double().log1p()
    x = features.double()
    mean, deviation = x.mean(0), x.std(0)
    # What never varies says nothing.
    deviation = torch.where(deviation > 1e-9, deviation, torch.inf)
    x = (x - mean) / deviation
    center = float(target.mean())
    # Where each row is a group of its own there is nothing to solve.
    members = [] if count >= len(x) else [(groups == group).nonzero().flatten() for group in groups.unique()]
    sample = torch.randperm(len(x), generator=generator(seed, "distances"))[:500]
    median = float(torch.pdist(x[sample]).median()) / x.shape[1] ** 0.5
    kernels = [Kernel(share, width * median) for share in SHARES for width in (WIDTHS if share else WIDTHS[:1])]
    best: tuple[float, Kernel, float, Tensor] | None = None
    for kernel in kernels:
        values, vectors = torch.linalg.eigh(kernel(x, x))
        turned = vectors.T @ (target - center)
        for ridge in RIDGES:
            inverse = 1 / (values.clamp_min(0) + ridge)
            residuals = _left_out(vectors, inverse, vectors @ (inverse * turned), members)
            error = float(residuals.abs().mean())
            if best is None or error < best[0]:
                best = error, kernel, ridge, residuals
    assert best is not None
    _, kernel, ridge, residuals = best
    gram = kernel(x, x) + ridge * torch.eye(len(x), dtype=x.dtype)
    weights = torch.linalg.solve(gram, target - center)
    return Predictor(mean, deviation, center, x, weights, kernel, residuals.sort().values)


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

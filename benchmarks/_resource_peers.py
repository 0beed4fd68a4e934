"""Other people's regression on the raw numbers of a table, run in a process of their own.

Reads lines ``[function, {argument: value}]`` and answers each with a JSON object. A ``file`` of safetensors has the
table: ``numbers`` ``[rows, numbers]``, ``categories`` ``[rows, categories]`` (the first one is the tool), ``target``
``[rows]``, and which rows are for training and which are judged, ``train`` and ``test``. Boosting has its depth and its
number of trees by cross-validation on the training rows, and learns the logarithm.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Floats = NDArray[np.float64]
Fit = Callable[[Floats, Floats], Any]
DEPTHS, TREES = (1, 2, 3, 5), (300, 1000)
"""Depth 1 has no interactions: with the logarithm as target it is close to the generator's own form."""
FOLDS = 5
QUICK = ((2,), (20,))


class Data:
    """A table for regression."""

    def __init__(self, file: str) -> None:
        arrays = load_file(file)
        self.numbers: Floats = arrays["numbers"]
        self.target: Floats = arrays["target"]
        self.train, self.test = (arrays[name].nonzero()[0] for name in ("train", "test"))
        self.categories = [self._one_hot(column) for column in arrays["categories"].T]

    def _one_hot(self, column: NDArray[Any]) -> Floats:
        """Indicators of the values that training rows have."""
        indicators: Floats = (column[:, None] == np.unique(column[self.train])).astype(np.float64)
        return indicators

    def raw(self) -> Floats:
        """Numbers as they are, and indicators of categories."""
        return np.hstack([self.numbers, *self.categories])

    def levels(self) -> Floats:
        """An indicator of each value of each field."""
        return np.hstack([*self.categories, *(self._one_hot(column) for column in self.numbers.T)])

    def interactions(self) -> Floats:
        """Logarithms of the numbers, for each tool too, and indicators of categories."""
        logs = np.log1p(self.numbers)
        by_tool = (self.categories[0][:, :, None] * logs[:, None, :]).reshape(len(logs), -1)
        return np.hstack([logs, by_tool, *self.categories])


def linear(inputs: Floats, target: Floats) -> Any:
    """Ridge regression with the penalty by cross-validation."""
    models, pipeline = import_module("sklearn.linear_model"), import_module("sklearn.pipeline")
    scale = import_module("sklearn.preprocessing").StandardScaler()
    ridge = models.RidgeCV(alphas=np.logspace(-4, 3, 15))
    return pipeline.make_pipeline(scale, ridge).fit(inputs, target)


def scikit(depth: int, trees: int, seed: int, **options: Any) -> Fit:
    """Gradient boosting of scikit-learn."""
    ensemble = import_module("sklearn.ensemble")
    model = ensemble.GradientBoostingRegressor(
        n_estimators=trees, max_depth=depth, learning_rate=0.05, subsample=0.8, random_state=seed, **options
    )
    return lambda inputs, target: import_module("sklearn.base").clone(model).fit(inputs, target)


def xgboost(depth: int, trees: int, seed: int) -> Fit:
    """XGBoost."""
    made = import_module("xgboost").XGBRegressor
    options = {"n_estimators": trees, "max_depth": depth, "learning_rate": 0.05, "subsample": 0.8}
    return lambda inputs, target: made(**options, random_state=seed, n_jobs=2).fit(inputs, target)


def folds(count: int, seed: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Rows to fit on, and rows left out, of each fold."""
    order = np.random.default_rng(seed).permutation(count)
    for part in np.array_split(order, FOLDS):
        yield np.setdiff1d(order, part), part


def left_out(fit: Fit, inputs: Floats, target: Floats, seed: int) -> Floats:
    """Prediction of each row by a model that was fitted without its fold."""
    predicted = np.empty_like(target)
    for rows, part in folds(len(target), seed):
        predicted[part] = fit(inputs[rows], target[rows]).predict(inputs[part])
    return predicted


def grid(quick: bool) -> Iterator[tuple[int, int]]:
    """Depths and numbers of trees that are compared."""
    return itertools.product(*(QUICK if quick else (DEPTHS, TREES)))


def chosen(kind: Callable[..., Fit], inputs: Floats, target: Floats, seed: int, quick: bool) -> tuple[Fit, Floats]:
    """The boosting of the depth and number of trees with the least error, and its left-out predictions."""
    best: tuple[float, Fit, Floats] | None = None
    for depth, trees in grid(quick):
        fit = kind(depth, trees, seed)
        predicted = left_out(fit, inputs, target, seed)
        error = float(np.abs(predicted - target).mean())
        if best is None or error < best[0]:
            best = error, fit, predicted
    assert best is not None
    return best[1:]


def error_of(predicted: Floats, target: Floats) -> float:
    """Mean absolute relative error."""
    return float((np.abs(predicted - target) / target).mean())


def mape(*, file: str, form: str, seed: int, quick: bool = False) -> dict[str, float]:
    """Mean relative error on the judged rows of each regression; ``form``: inputs of the log-linear one, ``levels`` or
    ``interactions``."""
    data = Data(file)
    train, test, log = data.train, data.test, np.log(data.target)
    raw, features = data.raw(), data.levels() if form == "levels" else data.interactions()
    # A time below 0 has no meaning.
    plain = linear(raw[train], data.target[train]).predict(raw[test]).clip(0)
    errors = {"linear": error_of(plain, data.target[test])}
    errors["log_linear"] = error_of(
        np.exp(linear(features[train], log[train]).predict(features[test])), data.target[test]
    )
    for name, kind in (("scikit", scikit), ("xgboost", xgboost)):
        fit, _ = chosen(kind, raw[train], log[train], seed, quick)
        errors[name] = error_of(np.exp(fit(raw[train], log[train]).predict(raw[test])), data.target[test])
    return errors | {"boosting": min(errors["scikit"], errors["xgboost"])}


def intervals(*, file: str, level: float, seed: int, quick: bool = False) -> dict[str, float]:
    """Coverage and mean widths of conformal quantile boosting (arXiv 1905.03222) on the judged rows.

    It is calibrated as the product is: by rows that are left out in folds, so that it learns from all training rows,
    too. Unlike the product's, its depth and number of trees, those with the narrowest left-out intervals, are chosen on
    the rows that calibrate it. Its intervals vary with the row; the product's have one width in the logarithm.
    """
    data = Data(file)
    raw, log = data.raw(), np.log(data.target)
    inputs, target = raw[data.train], log[data.train]
    best: tuple[float, float, list[Fit]] | None = None
    for depth, trees in grid(quick):
        fits = [
            scikit(depth, trees, seed, loss="quantile", alpha=alpha) for alpha in ((1 - level) / 2, (1 + level) / 2)
        ]
        low, high = (left_out(fit, inputs, target, seed) for fit in fits)
        margin = conformal(np.maximum(low - target, target - high), level)
        width = float((np.exp(high + margin) - np.exp(low - margin)).mean())
        if best is None or width < best[0]:
            best = width, margin, fits
    assert best is not None
    _, margin, fits = best
    low, high = (fit(inputs, target).predict(raw[data.test]) for fit in fits)
    low, high, measured = np.exp(low - margin), np.exp(high + margin), data.target[data.test]
    widths = (high - low).clip(0)
    return {
        "coverage": float(((low <= measured) & (measured <= high)).mean()),
        "width": float(widths.mean()),
        "relative_width": float((widths / measured).mean()),
    }


def conformal(scores: Floats, level: float) -> float:
    """The quantile of rank ``ceil((n + 1) level)``."""
    rank = math.ceil((len(scores) + 1) * level)
    return float(np.sort(scores)[min(rank, len(scores)) - 1])


def upper(*, file: str, level: float, seed: int, quick: bool = False) -> dict[str, Any]:
    """For every row a bound that its target stays below at ``level``, by boosting and its left-out residuals."""
    data = Data(file)
    raw, log = data.raw(), np.log(data.target)
    inputs, target = raw[data.train], log[data.train]
    fit, predicted = chosen(scikit, inputs, target, seed, quick)
    bounds = np.exp(fit(inputs, target).predict(raw) + conformal(target - predicted, level))
    return {"upper": bounds.tolist()}


if __name__ == "__main__":
    functions: dict[str, Callable[..., dict[str, Any]]]
    functions = {"mape": mape, "intervals": intervals, "upper": upper}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(functions[name](**arguments)), file=answers, flush=True)

"""Evaluation of predictions and recommendations on configurations that neither the encoder nor the prediction has seen,
beside simpler ways to the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.evaluate import read_back, relative_error
from services.resource.predict import features, fit, measured_fields, measured_number, quantile
from services.resource.recommend import cheapest, prices
from services.resource.schema import Schema
from services.runtime.seeds import generator

VECTOR, WITH_RAW, LOG_LINEAR = "vector", "vector and raw numbers", "log-linear on raw numbers"
TOOL, SHUFFLED, SAID = "control: the tool's mean", "control: another row's vector", "said by the language model"
RANDOM = "control: a random configuration"
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
CONFIDENCE = 0.9
"""Confidence of the recommendations."""
BOUNDS = 9
"""Bounds that are asked of each group of configurations, at quantiles of the number."""
FEWEST = 4
"""Fewest configurations of a group."""


class Way(NamedTuple):
    """One way to predict the logarithm of 1 + the number."""

    log_value: Tensor
    """Of each row of the table, ``[rows]``."""
    residuals: Tensor
    """Of the rows it was fitted on, each predicted without itself."""

    def upper(self, rows: Tensor) -> Tensor:
        """What the numbers of ``rows`` stay below with :data:`CONFIDENCE`."""
        return (self.log_value[rows] + quantile(self.residuals, CONFIDENCE)).expm1()


class Predictions(NamedTuple):
    """What :func:`prediction_figures` found."""

    number: str
    figures: dict[str, Any]
    """``rows``: how many were predicted; ``errors`` by way, ``coverage`` by level, and ``recommendations`` by way,
    empty for a schema without prices."""
    ways: dict[str, Way]


def prediction_figures(
    codec: ResourceCodec, describer: Describer, table: Table, *, train: Tensor, held_out: Tensor, seed: int
) -> Predictions:
    """Predict the first measured number of the ``held_out`` rows of ``table``, of which the encoder was trained on
    ``train``. All measured fields are unknown.

    Raises :class:`InvalidInput` for a schema without a measured number, and for too few rows to predict from.
    """
    schema, values = table.schema, table.values
    number, unknown = measured_number(schema), measured_fields(schema).expand(len(table), -1)
    target = values[:, number]
    ways: dict[str, Way] = {}
    for name, raw in ((VECTOR, False), (WITH_RAW, True)):
        inputs = features(codec, values, unknown, raw=raw)
        predictor = fit(inputs[train], target[train], seed, table.configurations[train])
        ways[name] = Way(predictor.log_value(inputs), predictor.residuals)
    ways[LOG_LINEAR] = _least_squares(_raw_inputs(schema, values, train), target, train)
    ways[TOOL] = _least_squares(_one_hot(table.tools, len(schema.tools)), target, train)
    order = torch.randperm(len(held_out), generator=generator(seed, "shuffled vectors"))
    shuffled = ways[VECTOR].log_value.index_copy(0, held_out, ways[VECTOR].log_value[held_out[order]])
    ways[SHUFFLED] = Way(shuffled, ways[VECTOR].residuals)
    truth = target[held_out]
    errors = {name: relative_error(way.log_value[held_out].expm1(), truth) for name, way in ways.items()}
    soft = codec.soft(codec.embed(values[held_out], unknown[held_out]))
    said = read_back(describer, soft, values[held_out], schema.templates[0]).values[:, number]
    # A text that cannot be read is as wrong as nothing.
    errors[SAID] = relative_error(said.nan_to_num(0.0), truth)
    shown = {name: errors[name] for name in (VECTOR, WITH_RAW, SAID, LOG_LINEAR, TOOL, SHUFFLED)}
    found = {
        "rows": len(held_out),
        "errors": {name: {"mean": float(each.mean()), "median": float(each.median())} for name, each in shown.items()},
        "coverage": [_coverage(level, ways, truth, held_out) for level in LEVELS if _possible(level, ways)],
        "recommendations": _recommendations(table, held_out, number, ways, seed),
    }
    return Predictions(schema.names[number], found, ways)


def _possible(level: float, ways: dict[str, Way]) -> bool:
    """Whether there are residuals enough for intervals at ``level``."""
    count = len(ways[VECTOR].residuals)
    return math.ceil((count + 1) * level) <= count


def _coverage(level: float, ways: dict[str, Way], truth: Tensor, rows: Tensor) -> dict[str, float]:
    """Share of the ``rows`` that intervals at ``level`` cover, and their median width relative to the number."""
    found = {"level": level}
    for name, prefix in ((VECTOR, ""), (TOOL, "control_")):
        margin = quantile(ways[name].residuals.abs(), level)
        low, high = ((ways[name].log_value[rows] + sign * margin).expm1().clamp_min(0) for sign in (-1, 1))
        found[f"{prefix}covered"] = float(((low <= truth) & (truth <= high)).double().mean())
        found[f"{prefix}width"] = float(((high - low) / truth.clamp_min(1e-9)).median())
    return found


def conditions(schema: Schema) -> list[int]:
    """Indices of the tool and the labels, which are not a matter of choice."""
    return [index for index, each in enumerate(schema.dimensions) if not each.number and not each.measured]


def groups(table: Table, rows: Tensor) -> list[Tensor]:
    """``rows`` by tool and labels, where there are at least :data:`FEWEST`."""
    number = torch.unique(table.values[rows][:, conditions(table.schema)], dim=0, return_inverse=True)[1]
    found = [rows[number == group] for group in range(int(number.max()) + 1)]
    return [group for group in found if len(group) >= FEWEST]


def _recommendations(
    table: Table, rows: Tensor, number: int, ways: dict[str, Way], seed: int
) -> dict[str, dict[str, float]]:
    """For each way: ``answered``, the share of the bounds below which it says some configuration stays; of these
    ``kept``, the share for which it does, and ``price``, how many times the lowest possible price it then costs."""
    cost, target = prices(table.schema, table.values), table.values[:, number]
    requests = [
        (group, float(bound))
        for group in groups(table, rows)
        for bound in target[group].quantile(torch.linspace(0.1, 0.9, BOUNDS, dtype=torch.float64))
    ]
    if not requests or not bool((cost > 0).all()):
        return {}
    rng = generator(seed, "random configurations")

    def score(choose: Callable[[Tensor, float], tuple[int, bool]]) -> dict[str, float]:
        kept, ratios = [], []
        for group, bound in requests:
            index, fits = choose(group, bound)
            if fits:
                below = target[group] <= bound
                kept.append(bool(below[index]))
                if kept[-1]:
                    ratios.append(float(cost[group[index]] / cost[group[below]].min()))
        return {"answered": len(kept) / len(requests), "kept": _mean(kept), "price": _mean(ratios)}

    def by(way: Way) -> dict[str, float]:
        return score(lambda group, bound: cheapest(cost[group], way.upper(group), bound))

    found = {name: by(ways[name]) for name in (VECTOR, WITH_RAW, LOG_LINEAR, TOOL)}
    return found | {RANDOM: score(lambda group, _: (int(torch.randint(len(group), (), generator=rng)), True))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _least_squares(inputs: Tensor, target: Tensor, train: Tensor) -> Way:
    """The logarithm by least squares of ``inputs`` ``[rows, columns]``; residuals are of rows that are left out."""
    log, x = target.log1p(), inputs[train]
    inverse = torch.linalg.pinv(x)
    prediction = inputs @ (inverse @ log[train])
    leverage = (x * inverse.T).sum(1)
    # Of a row that alone has a label nothing is known without it.
    residuals = (log[train] - prediction[train]) / (1 - leverage).clamp_min(1e-3)
    return Way(prediction, residuals.sort().values)


def _raw_inputs(schema: Schema, values: Tensor, train: Tensor) -> Tensor:
    """What is not measured: indicators of labels and declared levels, and logarithms of numbers, standardised."""
    columns = [torch.ones(len(values), 1, dtype=torch.float64)]
    for index, dimension in enumerate(schema.dimensions):
        column = values[:, index]
        if dimension.measured:
            continue
        if dimension.number:
            logarithm = column.log1p()
            columns.append((logarithm - logarithm[train].mean()).unsqueeze(1))
            columns.append((column.unsqueeze(1) == torch.tensor(dimension.levels, dtype=torch.float64)).double())
        else:
            columns.append(_one_hot(column.long(), len(dimension.labels)))
    return torch.cat(columns, 1)


def _one_hot(labels: Tensor, count: int) -> Tensor:
    return nn.functional.one_hot(labels, count).double()


def front(cost: Tensor, numbers: Tensor) -> Tensor:
    """Indices of the rows that no cheaper or equally cheap row is below, by cost."""
    best, kept = float("inf"), []
    for index in sorted(range(len(cost)), key=lambda row: (float(cost[row]), float(numbers[row]))):
        if float(numbers[index]) < best:
            best = float(numbers[index])
            kept.append(index)
    return torch.tensor(kept, dtype=torch.long)


def recommended(way: Way, cost: Tensor, rows: Tensor) -> Tensor:
    """Those of ``rows`` that are recommended for some bound, by cost."""
    return rows[front(cost[rows], way.upper(rows))]

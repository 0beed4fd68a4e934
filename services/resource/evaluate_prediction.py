"""Evaluation of predictions and recommendations on configurations that neither the encoder nor the prediction has seen,
beside simpler methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.evaluate import counted, read_back, relative_error
from services.resource.predict import Inputs, fit, interval, measured_fields, measured_number, upper_bound
from services.resource.recommend import cheapest, prices
from services.resource.schema import Schema, step
from services.runtime.run import Run
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


class Method(NamedTuple):
    """Predictions of the logarithm of 1 + the number, in steps, by one method."""

    step: float
    """What the last decimal of the number counts."""
    log_value: Tensor
    """Of each row of the table, ``[rows]``."""
    residuals: Tensor
    """Of the rows it was fitted on, each predicted without itself."""

    def upper(self, rows: Tensor) -> Tensor:
        """What the numbers of ``rows`` stay below with :data:`CONFIDENCE`."""
        return self.step * upper_bound(self.log_value[rows], self.residuals, CONFIDENCE)

    def values(self, rows: Tensor) -> Tensor:
        """The predicted numbers of ``rows``."""
        return self.step * self.log_value[rows].expm1()

    def ends(self, rows: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Both ends of the intervals of ``rows``."""
        _, low, high = interval(self.log_value[rows], self.residuals, level)
        return self.step * low, self.step * high


class Predictions(NamedTuple):
    """What :func:`prediction_figures` found."""

    number: str
    figures: dict[str, Any]
    """``rows``: how many were predicted; ``described``: of how many of these the language model said the number, which
    its errors are of; ``measurements``: from how many, and ``left_out``: how many more there are, of
    many a random part being used; ``errors`` by method, ``coverage`` by level, and ``recommendations`` by method, empty
    for a schema without prices."""
    methods: dict[str, Method]


def prediction_figures(
    codec: ResourceCodec,
    describer: Describer,
    table: Table,
    *,
    train: Tensor,
    held_out: Tensor,
    described: Tensor,
    seed: int,
    run: Run,
) -> Predictions:
    """Predict the first measured number of the ``held_out`` rows of ``table``, of which the encoder was trained on
    ``train``. All measured fields are unknown. ``described``: those of the ``held_out`` rows that the language model
    describes.

    Raises :class:`InvalidInput` for a schema without a measured number, and for too few rows to predict from.
    """
    schema, values = table.schema, table.values
    number, unknown = measured_number(schema), measured_fields(schema).expand(len(table), -1)
    target, counts = values[:, number], step(schema.dimensions[number])
    methods: dict[str, Method] = {}
    for name, raw in ((VECTOR, False), (WITH_RAW, True)):
        inputs = Inputs(codec, table.at(train), unknown[0], raw=raw, seed=seed)
        features = inputs(values)
        predictor = fit(features[train], target[train] / counts, seed, table.configurations[train])
        methods[name] = Method(counts, predictor.log_value(features), predictor.residuals)
    methods[LOG_LINEAR] = _least_squares(_raw_inputs(schema, values, train), target, counts, train)
    methods[TOOL] = _least_squares(_one_hot(table.tools, len(schema.tools)), target, counts, train)
    order = torch.randperm(len(held_out), generator=generator(seed, "shuffled vectors"))
    shuffled = methods[VECTOR].log_value.index_copy(0, held_out, methods[VECTOR].log_value[held_out[order]])
    methods[SHUFFLED] = methods[VECTOR]._replace(log_value=shuffled)
    truth = target[held_out]
    errors = {name: relative_error(method.values(held_out), truth) for name, method in methods.items()}
    soft = codec.soft(codec.embed(values[described], unknown[described]))
    # Only now: what comes before may raise, and a stage that has begun must end.
    advance = counted(run, "evaluation/predictions", len(described), "descriptions")
    written = read_back(describer, soft, values[described], schema.templates[0], advance).values[:, number]
    # A text that cannot be read is as wrong as nothing.
    errors[SAID] = relative_error(written.nan_to_num(0.0), target[described])
    shown = {name: errors[name] for name in (VECTOR, WITH_RAW, SAID, LOG_LINEAR, TOOL, SHUFFLED)}
    figures = {
        "rows": len(held_out),
        "described": len(described),
        "measurements": len(methods[VECTOR].residuals),
        "left_out": len(train) - len(methods[VECTOR].residuals),
        "errors": {
            name: {"mean": float(error.mean()), "median": float(error.median())} for name, error in shown.items()
        },
        "coverage": [_coverage(level, methods, truth, held_out) for level in LEVELS if _possible(level, methods)],
        "recommendations": _recommendations(table, held_out, number, methods, seed),
    }
    return Predictions(schema.names[number], figures, methods)


def _possible(level: float, methods: dict[str, Method]) -> bool:
    """Whether there are residuals enough for intervals at ``level``."""
    count = len(methods[VECTOR].residuals)
    return math.ceil((count + 1) * level) <= count


def _coverage(level: float, methods: dict[str, Method], truth: Tensor, rows: Tensor) -> dict[str, float]:
    """Share of the ``rows`` that intervals at ``level`` cover, and their median width relative to the number."""
    figures = {"level": level}
    for name, prefix in ((VECTOR, ""), (TOOL, "control_")):
        low, high = methods[name].ends(rows, level)
        figures[f"{prefix}covered"] = float(((low <= truth) & (truth <= high)).double().mean())
        figures[f"{prefix}width"] = float(((high - low) / truth.clamp_min(1e-9)).median())
    return figures


def conditions(schema: Schema) -> list[int]:
    """Indices of the tool and the labels, which are not a matter of choice."""
    return [
        index for index, dimension in enumerate(schema.dimensions) if not dimension.number and not dimension.measured
    ]


def groups(table: Table, rows: Tensor) -> list[Tensor]:
    """``rows`` by tool and labels, where there are at least :data:`FEWEST`."""
    number = torch.unique(table.values[rows][:, conditions(table.schema)], dim=0, return_inverse=True)[1]
    by_group = [rows[number == group] for group in range(int(number.max()) + 1)]
    return [group for group in by_group if len(group) >= FEWEST]


class Request(NamedTuple):
    """A question for a configuration below a bound."""

    rows: Tensor
    """Rows of the configurations to choose from."""
    bound: float
    optimum: float
    """Lowest price of those that stay below the bound."""


def requests(table: Table, rows: Tensor, number: int) -> list[Request]:
    """Of each group of ``rows``, bounds at :data:`BOUNDS` quantiles of the ``number``, of which some row stays below
    each."""
    cost, target = prices(table.schema, table.values), table.values[:, number]
    shares = torch.linspace(0.1, 0.9, BOUNDS, dtype=torch.float64)
    return [
        Request(group, bound, float(cost[group[target[group] <= bound]].min()))
        for group in groups(table, rows)
        for bound in target[group].quantile(shares).tolist()
    ]


def _recommendations(
    table: Table, rows: Tensor, number: int, methods: dict[str, Method], seed: int
) -> dict[str, dict[str, float]]:
    """For each method: ``answered``, the share of the bounds below which it says some configuration stays; of these
    ``kept``, the share for which it does, and ``price``, how many times the lowest possible price it then costs."""
    cost, target = prices(table.schema, table.values), table.values[:, number]
    asked = requests(table, rows, number)
    if not asked or not bool((cost > 0).all()):
        return {}
    rng = generator(seed, "random configurations")

    def score(choose: Callable[[Request], tuple[int, bool]]) -> dict[str, float]:
        kept, ratios = [], []
        for request in asked:
            index, fits = choose(request)
            if fits:
                row = request.rows[index]
                kept.append(bool(target[row] <= request.bound))
                if kept[-1]:
                    ratios.append(float(cost[row]) / request.optimum)
        return {"answered": len(kept) / len(asked), "kept": _mean(kept), "price": _mean(ratios)}

    def by(method: Method) -> dict[str, float]:
        return score(lambda request: cheapest(cost[request.rows], method.upper(request.rows), request.bound))

    def at_random(request: Request) -> tuple[int, bool]:
        return int(torch.randint(len(request.rows), (), generator=rng)), True

    figures = {name: by(methods[name]) for name in (VECTOR, WITH_RAW, LOG_LINEAR, TOOL)}
    return figures | {RANDOM: score(at_random)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _least_squares(inputs: Tensor, target: Tensor, counts: float, train: Tensor) -> Method:
    """The logarithm of 1 + ``target`` in steps, by least squares of ``inputs`` ``[rows, columns]``; residuals are of
    rows that are left out."""
    log, x = (target / counts).log1p(), inputs[train]
    inverse = torch.linalg.pinv(x)
    prediction = inputs @ (inverse @ log[train])
    leverage = (x * inverse.T).sum(1)
    # Of a row that alone has a label nothing is known without it.
    residuals = (log[train] - prediction[train]) / (1 - leverage).clamp_min(1e-3)
    return Method(counts, prediction, residuals.sort().values)


def _raw_inputs(schema: Schema, values: Tensor, train: Tensor) -> Tensor:
    """What is not measured: indicators of labels and declared levels, and logarithms of numbers, standardised."""
    columns = [torch.ones(len(values), 1, dtype=torch.float64)]
    for index, dimension in enumerate(schema.dimensions):
        column = values[:, index]
        if dimension.measured:
            continue
        if dimension.number:
            logarithm = (column / step(dimension)).log1p()
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


def recommended(method: Method, cost: Tensor, rows: Tensor) -> Tensor:
    """Those of ``rows`` that are recommended for some bound, by cost."""
    return rows[front(cost[rows], method.upper(rows))]

"""Predictions from embeddings in which the number is unknown, and their intervals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel
from services.resource import predict
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.predict import (
    FEWEST,
    Choice,
    Inputs,
    NumberPredictor,
    fit,
    interval,
    quantile,
    upper_bound,
)
from services.resource.recommend import Recommender
from services.resource.schema import Schema
from tests.resource.made import formula_table, untrained

GIVEN = {"tool": "detect", "size": "medium", "cores": 4.0, "memory_gb": 8.0}


@pytest.fixture(scope="module")
def table() -> Table:
    return formula_table()


@pytest.fixture(scope="module")
def codec(table: Table, language: LanguageModel) -> ResourceCodec:
    return untrained(table, language)


@pytest.mark.parametrize("raw", [False, True])
def test_intervals_cover_what_was_never_measured(table: Table, codec: ResourceCodec, raw: bool) -> None:
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(1))
    measured, others = table.at(order[:60]), table.values[order[60:]]
    predictor = NumberPredictor(codec, measured, raw=raw)
    found = predictor.intervals(others, torch.zeros_like(others, dtype=torch.bool), 0.9)
    truth = others[:, -1]
    # The noise alone makes 2.5 %; the factors of one level to the next are 1.3 to 2.5. The encoder is not trained.
    assert ((found.value - truth).abs() / truth).mean() < 0.05
    covered = ((found.low <= truth) & (truth <= found.high)).float().mean()
    assert covered >= 0.75
    wider = predictor.intervals(others, torch.zeros_like(others, dtype=torch.bool), 0.95)
    assert (wider.high >= found.high).all() and (wider.low <= found.low).all()


@pytest.mark.parametrize("times", [1, 2])
def test_a_kernel_that_is_chosen_on_a_part_predicts_as_well(
    times: int, table: Table, codec: ResourceCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where configurations are measured several times."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(1))
    rows, others = order[:60].repeat(times), table.values[order[60:]]
    unknown, errors = torch.zeros_like(others, dtype=torch.bool), []
    for part in (predict.CHOICE_ROWS, 30):
        monkeypatch.setattr(predict, "CHOICE_ROWS", part)
        found = NumberPredictor(codec, table.at(rows), raw=True).intervals(others, unknown)
        errors.append(float(((found.value - others[:, -1]) / others[:, -1]).abs().mean()))
    assert errors[0] < 0.08 and errors[1] < 0.08


def test_the_number_itself_changes_nothing(table: Table, codec: ResourceCodec) -> None:
    predictor = NumberPredictor(codec, table)
    known = torch.zeros(4, 5, dtype=torch.bool)
    rows, others = table.values[:4], table.values[:4].clone()
    others[:, -1] = torch.tensor([1.0, 9999.0, 77.0, float("nan")])
    for one, other in zip(predictor.intervals(rows, known), predictor.intervals(others, known), strict=True):
        assert torch.equal(one, other)


def test_any_number_is_predicted_and_fields_may_be_unknown(table: Table, codec: ResourceCodec) -> None:
    exact = NumberPredictor(codec, table).predict(GIVEN, 0.8)
    assert exact.dimension == "latency_ms" and exact.low < 300 < exact.high and exact.outside == []
    vague = NumberPredictor(codec, table).predict({**GIVEN, "cores": "unknown"}, 0.8)
    assert vague.high - vague.low > 2 * (exact.high - exact.low)
    slow, fast = (
        NumberPredictor(codec, table, "cores", raw=True).predict(
            {"tool": "detect", "size": "medium", "cores": None, "memory_gb": 8.0, "latency_ms": latency}
        )
        for latency in (450.0, 160.0)
    )
    assert slow.dimension == "cores" and slow.value < fast.value


def test_numbers_outside_the_declared_range_are_marked(table: Table, codec: ResourceCodec) -> None:
    found = NumberPredictor(codec, table).predict({**GIVEN, "cores": 64.0})
    assert found.outside == ["cores"] and found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("dimension", "given", "level", "field", "says"),
    [
        (None, {}, 0.0, "level", "between 0 and 1, not 0"),
        (None, {}, 1.0, "level", "between 0 and 1, not 1"),
        (None, {}, float("nan"), "level", "between 0 and 1, not nan"),
        (None, {}, 0.999, "level", "takes at least 999 measurements, and there are 96"),
        ("size", {}, 0.9, "dimension", "size is a category"),
        ("speed", {}, 0.9, "dimension", "there is no 'speed'; there are tool, size, cores, memory_gb, latency_ms"),
        (None, {"latency_ms": 3.0}, 0.9, "given.latency_ms", "is what is predicted"),
        (None, {"tool": "unknown"}, 0.9, "given.tool", "must be known"),
        (None, {"tool": "swim"}, 0.9, "given.tool", "swim"),
        (None, {"size": "huge"}, 0.9, "given.size", "huge"),
        (None, {"cores": -1.0}, 0.9, "given.cores", "-1"),
        (None, {"cores": float("inf")}, 0.9, "given.cores", "inf"),
        (None, {"gpus": 1.0}, 0.9, "given.gpus", "there is no such field"),
    ],
)
def test_what_cannot_be_predicted(
    table: Table,
    codec: ResourceCodec,
    *,
    dimension: str | None,
    given: dict[str, Any],
    level: float,
    field: str,
    says: str,
) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        NumberPredictor(codec, table, dimension).predict(GIVEN | given, level)
    assert caught.value.violations[0].field == field


def test_a_tool_without_measurements_and_too_few_of_them(table: Table, codec: ResourceCodec) -> None:
    one = table.at((table.tools == 1).nonzero().flatten())
    with pytest.raises(InvalidInput, match="there are no measurements of detect") as caught:
        NumberPredictor(codec, one).predict(GIVEN)
    assert caught.value.violations[0].field == "given.tool"
    with pytest.raises(InvalidInput, match=f"takes at least {FEWEST}"):
        NumberPredictor(codec, table.at(torch.arange(FEWEST - 1))).predict(GIVEN)


@pytest.mark.parametrize("features", [[[0.0]] * 9 + [[1.0]] * 3, [[1.0]] * 12])
def test_rows_that_are_the_same_can_be_predicted_from(features: list[list[float]]) -> None:
    """Most of them, or all: with little known that is common."""
    numbers = torch.tensor([100.0, 102.0, 98.0] * 3 + [400.0, 404.0, 396.0], dtype=torch.float64)
    predictor = fit(torch.tensor(features), numbers)
    (first, *_, last) = predictor.interval(torch.tensor(features), 0.5).value.tolist()
    if features[0] != features[-1]:
        assert first == pytest.approx(100, rel=0.1) and last == pytest.approx(400, rel=0.1)
    else:
        assert first == last == pytest.approx(141, rel=0.05)


def left_out(choice: predict.Choice, x: torch.Tensor, target: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Residuals of regressions that are fitted anew without each group."""
    residuals = torch.empty_like(target)
    for group in range(int(groups.max()) + 1):
        out, rest = groups == group, groups != group
        gram = choice.kernel(x[rest], x[rest]) + choice.ridge * torch.eye(int(rest.sum()), dtype=torch.float64)
        residuals[out] = target[out] - choice.kernel(x[out], x[rest]) @ torch.linalg.solve(gram, target[rest])
    return residuals


@pytest.mark.parametrize("times", [1, 2])
def test_kernel_and_ridge_have_the_least_error_of_groups_that_are_left_out(times: int) -> None:
    rng = torch.Generator().manual_seed(0)
    groups = torch.arange(12).repeat(times)
    x = torch.randn(12, 3, generator=rng, dtype=torch.float64).repeat(times, 1)
    target = torch.rand(len(x), generator=rng, dtype=torch.float64)
    kernels = predict._kernels(x)
    choice = predict._choose(x, target, groups, torch.arange(len(x)), kernels)
    errors = []
    for kernel, ridge in itertools.product(kernels, predict.RIDGES):
        residuals = left_out(Choice(kernel, ridge), x, target, groups)
        found = predict._Spectrum.of(kernel, x, groups).residuals(target, ridge)
        torch.testing.assert_close(found, residuals, rtol=1e-4, atol=1e-6)
        errors.append(float(residuals.abs().mean()))
    assert len(kernels) == 7 and len(errors) == 35
    assert float(left_out(choice, x, target, groups).abs().mean()) == pytest.approx(min(errors), rel=1e-4)


def test_residuals_are_of_regressions_that_saw_neither_the_row_nor_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor did the choice of their kernel and ridge."""
    rng = torch.Generator().manual_seed(0)
    groups = torch.arange(40).repeat(2)
    features = torch.randn(40, 3, generator=rng, dtype=torch.float64).repeat(2, 1)
    numbers = (features.sum(1) + torch.rand(80, generator=rng)).exp()
    asked: list[tuple[torch.Tensor, Choice]] = []

    def noted(x: torch.Tensor, target: torch.Tensor, groups: torch.Tensor, order: torch.Tensor, kernels: Any) -> Choice:
        asked.append((order, choose(x, target, groups, order, kernels)))
        return asked[-1][1]

    choose = predict._choose
    monkeypatch.setattr(predict, "_choose", noted)
    found = fit(features, numbers, groups=groups)
    assert found.measurements == len(found.residuals) == 80 and len(asked) == 1 + predict.FOLDS
    x, covered = (features - features.mean(0)) / features.std(0), torch.zeros(80, dtype=torch.int64)
    for order, choice in asked[1:]:
        rows = torch.ones(80, dtype=torch.bool)
        rows[order] = False
        # Both rows of each of eight groups.
        assert int(rows.sum()) == 16 and not set(groups[rows].tolist()) & set(groups[order].tolist())
        wanted = left_out(choice, x, numbers.log1p(), groups)[rows]
        torch.testing.assert_close(found.residuals[rows], wanted, rtol=1e-5, atol=1e-7)
        covered += rows
    assert covered.tolist() == [1] * 80
    # Another number of a group moves its own residuals by as much.
    moved = numbers.clone()
    moved[[7, 47]] = (numbers[[7, 47]].log1p() + 3.0).expm1()
    change = fit(features, moved, groups=groups).residuals - found.residuals
    assert change[[7, 47]].tolist() == pytest.approx([3.0, 3.0], rel=1e-6)


def test_with_calibration_the_residuals_are_of_rows_that_nothing_else_used() -> None:
    """Repeated measurements of a configuration are on one side; and intervals cover as asked, those of zero width do
    not."""
    rng = torch.Generator().manual_seed(0)
    groups = torch.arange(200).repeat(2)
    features = torch.randn(200, 3, generator=rng, dtype=torch.float64).repeat(2, 1)
    noise = 0.1 * torch.randn(400, generator=rng, dtype=torch.float64)
    numbers = (5 + features.sum(1) + noise).exp()
    found = fit(features, numbers, groups=groups, calibration=0.25)
    assert found.measurements == 400 and len(found.residuals) == 2 * 50 and len(found.regression.rows) == 300
    errors = numbers.log1p() - found.log_value(features)
    is_residual = torch.isclose(errors.unsqueeze(1), found.residuals).any(1)
    assert int(is_residual.sum()) == 100 and torch.equal(is_residual[:200], is_residual[200:])
    # What they measured moves no prediction.
    moved = torch.where(is_residual, numbers * 2, numbers)
    again = fit(features, moved, groups=groups, calibration=0.25)
    assert torch.equal(again.log_value(features), found.log_value(features))
    new = torch.randn(500, 3, generator=rng, dtype=torch.float64)
    truth = (5 + new.sum(1) + 0.1 * torch.randn(500, generator=rng, dtype=torch.float64)).exp()
    interval = found.interval(new, 0.9)
    assert 0.85 <= float(((interval.low <= truth) & (truth <= interval.high)).double().mean()) <= 0.96
    for share in (-0.1, 1.0):
        with pytest.raises(InvalidInput, match="calibration"):
            fit(features, numbers, groups=groups, calibration=share)


@pytest.mark.parametrize("raw", [False, True])
def test_a_prediction_is_the_same_in_every_unit(
    raw: bool, table: Table, codec: ResourceCodec, language: LanguageModel
) -> None:
    """In seconds with three decimals as in milliseconds."""
    spec = codec.schema.spec
    *others, latency = spec.dimensions
    ends = {name: (getattr(latency, name) or 0) / 1000 for name in ("low", "high")}
    changed = latency.model_copy(update=ends | {"decimals": 3})
    schema = Schema(spec.model_copy(update={"dimensions": [*others, changed]}), codec.schema.tools)
    values = table.values.clone()
    values[:, -1] /= 1000
    in_seconds = Table(schema, values)
    other, same = untrained(in_seconds, language), untrained(table, language)
    found = NumberPredictor(other, in_seconds, raw=raw).predict(GIVEN, 0.8)
    wanted = NumberPredictor(same, table, raw=raw).predict(GIVEN, 0.8)
    in_milliseconds = [1000 * number for number in (found.value, found.low, found.high)]
    assert in_milliseconds == pytest.approx([wanted.value, wanted.low, wanted.high], rel=0.02)
    bounded = [
        Recommender(*pair, raw=raw).recommend({"tool": "detect"}, bound)
        for pair, bound in (((other, in_seconds), 0.3), ((same, table), 300.0))
    ]
    assert bounded[0].configuration == bounded[1].configuration
    assert bounded[0].upper == pytest.approx(bounded[1].upper / 1000, rel=0.02)


def test_fields_are_read_from_the_embedding(table: Table, codec: ResourceCodec) -> None:
    """Also of configurations that were never measured, and as well as they are in the vector."""
    unknown = torch.tensor([False, False, False, False, True])
    part = table.at(torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:40])
    read, both = (Inputs(codec, part, unknown, raw=raw)(table.values) for raw in (False, True))
    # Two tools, three sizes, and a logarithm and four levels of both numbers.
    count = 2 + 3 + 5 + 5
    assert read.shape == (96, count) and torch.equal(both[:, :count], read)
    given = both[:, count:]
    row = [1, 0, 1, 0, 0, math.log1p(2), 1, 0, 0, 0, math.log1p(4), 1, 0, 0, 0]
    torch.testing.assert_close(given[0], torch.tensor(row, dtype=torch.float64))
    is_logarithm = torch.zeros(count, dtype=torch.bool)
    is_logarithm[[5, 10]] = True
    assert torch.equal(read[:, ~is_logarithm], given[:, ~is_logarithm])
    assert float((read - given).abs().max()) < 0.1


def test_of_many_measurements_a_part_is_used_and_counted(
    table: Table, codec: ResourceCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NumberPredictor(codec, table).predict(GIVEN).measurements == len(table) == 96
    monkeypatch.setattr(predict, "MOST_ROWS", 50)
    assert NumberPredictor(codec, table).predict(GIVEN).measurements == 50


def test_intervals_are_quantiles_of_residuals_in_the_logarithm() -> None:
    residuals = torch.tensor([-0.4, 0.1, -0.2, 0.3], dtype=torch.float64)
    value = torch.tensor([99.0], dtype=torch.float64).log1p()
    # Of four residuals the third in size, as ceil(5 x .6) = 3.
    assert quantile(residuals.abs(), 0.6) == 0.3
    found = interval(value, residuals, 0.6)
    assert [float(end) for end in found] == pytest.approx([99, 100 * math.exp(-0.3) - 1, 100 * math.exp(0.3) - 1])
    assert float(upper_bound(value, residuals, 0.6)) == pytest.approx(100 * math.exp(0.1) - 1)
    # A number is never below 0.
    assert float(interval(value - 4.6, residuals, 0.6).low) == 0

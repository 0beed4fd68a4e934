"""The report of an encoder, and the predictions in it, on a table whose latency follows a formula."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.evaluate import control_figures, describe_figures, guess_figures
from services.resource.evaluate_prediction import (
    LOG_LINEAR,
    RANDOM,
    SAID,
    SHUFFLED,
    TOOL,
    VECTOR,
    WITH_RAW,
    Predictions,
    _least_squares,
    front,
    prediction_figures,
    recommended,
)
from services.resource.recommend import cheapest, prices
from services.resource.report import write_report
from services.resource.schema import Schema
from services.resource.texts import Template
from services.runtime.run import Run
from tests.recorder import Recorder
from tests.resource.made import NOISE, formula_table, untrained


class Reader(Describer):
    """Says of every vector that its latency is 500."""

    def write(self, soft: Tensor, template: Template) -> list[str]:
        return [template.write([0, 0, 2, 4, 500.0])] * len(soft)


def unpriced(table: Table) -> Table:
    """The table with a schema in which nothing has a price."""
    dimensions = [dimension.model_copy(update={"price": 0.0}) for dimension in table.schema.spec.dimensions]
    spec = table.schema.spec.model_copy(update={"dimensions": dimensions})
    return Table(Schema(spec, table.schema.tools), table.values)


@pytest.fixture(scope="module")
def table() -> Table:
    return formula_table()


@pytest.fixture(scope="module")
def codec(table: Table, language: LanguageModel) -> ResourceCodec:
    return untrained(table, language)


def predict(
    codec: ResourceCodec,
    reader: Describer,
    table: Table,
    split: tuple[Tensor, Tensor],
    *,
    described: Tensor | None = None,
    run: Run | None = None,
) -> Predictions:
    """Figures of predictions for a ``split`` into rows to train on, and rows that were held out."""
    train, held_out = split
    described = held_out if described is None else described
    return prediction_figures(
        codec, reader, table, train=train, held_out=held_out, described=described, seed=0, run=run or Run()
    )


@pytest.fixture(scope="module")
def predictions(table: Table, codec: ResourceCodec, language: LanguageModel) -> Predictions:
    train, held_out = table.hold_out(0.4, 0)
    return predict(codec, Reader(language, table.schema), table, (train, held_out))


def test_predictions_stand_beside_controls(table: Table, predictions: Predictions) -> None:
    errors = {name: each["mean"] for name, each in predictions.figures["errors"].items()}
    assert list(errors) == [VECTOR, WITH_RAW, SAID, LOG_LINEAR, TOOL, SHUFFLED]
    # They miss little more than the noise, whose mean is half its most, as the formula's own form does.
    assert max(errors[LOG_LINEAR], errors[VECTOR], errors[WITH_RAW]) < 1.3 * NOISE / 2
    assert min(errors[TOOL], errors[SHUFFLED]) > 0.4
    truth = table.values[table.hold_out(0.4, 0)[1], -1]
    assert errors[SAID] == pytest.approx(float(((500 - truth).abs() / truth).mean()))
    assert predictions.number == "latency_ms" and predictions.figures["rows"] == len(truth)


def test_intervals_cover_as_asked_and_are_narrower_than_the_controls(predictions: Predictions) -> None:
    rows = predictions.figures["coverage"]
    # 58 rows are too few for 0.99.
    assert [row["level"] for row in rows] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    for row in rows:
        assert abs(row["covered"] - row["level"]) < 0.35 and abs(row["control_covered"] - row["level"]) < 0.35
        assert row["width"] < row["control_width"]
    assert [row["width"] for row in rows] == sorted(row["width"] for row in rows)


def test_recommendations_stand_beside_controls(predictions: Predictions) -> None:
    found: Mapping[str, Mapping[str, float]] = predictions.figures["recommendations"]
    assert list(found) == [VECTOR, WITH_RAW, LOG_LINEAR, TOOL, RANDOM]
    best, control = found[LOG_LINEAR], found[RANDOM]
    assert best["kept"] >= 0.9 and best["answered"] > 0.8 and 1 <= best["price"] < 1.3
    assert control["answered"] == 1 and control["kept"] < 0.7


def test_residuals_of_least_squares_are_those_of_rows_left_out() -> None:
    rng = torch.Generator().manual_seed(0)
    x, target = torch.randn(9, 3, generator=rng).double(), torch.rand(9, generator=rng).double() * 50
    rows = torch.arange(8)
    method = _least_squares(x, target, 1.0, rows)
    residuals = []
    for row in range(8):
        others = rows[rows != row]
        weights = torch.linalg.lstsq(x[others], target[others].log1p()).solution
        residuals.append(float(target[row].log1p() - x[row] @ weights))
    torch.testing.assert_close(method.residuals, torch.tensor(sorted(residuals), dtype=torch.float64))
    weights = torch.linalg.lstsq(x[:8], target[:8].log1p()).solution
    torch.testing.assert_close(method.log_value, x @ weights)


def test_the_front_is_what_is_recommended_for_some_bound(table: Table, predictions: Predictions) -> None:
    cost, method = prices(table.schema, table.values), predictions.methods[VECTOR]
    rows = (table.values[:, :2] == 0).all(1).nonzero().flatten()
    upper = method.upper(rows)
    chosen = {int(rows[cheapest(cost[rows], upper, float(bound))[0]]) for bound in upper}
    assert chosen == set(recommended(method, cost, rows).tolist())
    assert front(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([5.0, 5.0, 4.0, 1.0])).tolist() == [0, 2, 3]


def test_without_prices_nothing_is_recommended_and_without_measurements_nothing_predicted(
    table: Table, codec: ResourceCodec, language: LanguageModel
) -> None:
    train, held_out = table.hold_out(0.4, 0)
    reader, free = Reader(language, table.schema), unpriced(table)
    found = predict(codec, reader, free, (train, held_out))
    assert found.figures["recommendations"] == {}
    run = Recorder()
    with pytest.raises(InvalidInput, match="takes at least 10"):
        predict(codec, reader, table, (train[:9], held_out), run=run)
    # No stage is left that never ends.
    assert not run.stages


def test_only_the_language_model_is_asked_about_a_part_of_the_rows(
    table: Table, codec: ResourceCodec, language: LanguageModel, predictions: Predictions, tmp_path: Path
) -> None:
    train, held_out = table.hold_out(0.4, 0)
    reader, run = Reader(language, table.schema), Recorder()
    found = predict(codec, reader, table, (train, held_out), described=held_out[:3], run=run)
    assert (found.figures["rows"], found.figures["described"]) == (len(held_out), 3)
    assert run.stages == [("evaluation/predictions", 3, "descriptions")] and run.done[-1] == 3
    truth = table.values[held_out[:3], -1]
    assert found.figures["errors"].pop(SAID)["mean"] == pytest.approx(float(((500 - truth).abs() / truth).mean()))
    whole = {name: errors for name, errors in predictions.figures["errors"].items() if name != SAID}
    assert found.figures["errors"] == whole
    for name in ("coverage", "recommendations"):
        assert found.figures[name] == predictions.figures[name]
    found.figures["errors"][SAID] = predictions.figures["errors"][SAID]
    page = report_of(tmp_path, table, language, found)
    assert f"of 3 of the {len(held_out)} configurations, drawn at random" in page


def test_guesses_are_the_most_frequent_value_and_the_median(table: Table) -> None:
    values = torch.tensor([[0, 0, 2, 4, 100], [0, 1, 2, 4, 0], [0, 2, 4, 4, 200], [0, 0, 2, 4, 100]]).double()
    found = guess_figures(table.schema, values)
    assert found["field_accuracy"] == {"tool": 1, "size": 0.5, "cores": 0.75, "memory_gb": 1, "latency_ms": 0.5}
    # Of 0 the error is absolute, and 1 is the most there is.
    assert found["field_error"] == {"cores": 0.125, "memory_gb": 0, "latency_ms": (0 + 1 + 0.5 + 0) / 4}


def report_of(folder: Path, table: Table, language: LanguageModel, predictions: Predictions | str) -> str:
    """The page of a report, and its pictures, in ``folder``."""
    codec, reader = untrained(table, language), Reader(language, table.schema)
    part = describe_figures(codec, reader, table.values[:20], Run())
    control = control_figures(codec, reader, table.values[:20], 0, Run())
    history = [{"step": step, "description": 1 / (1 + step)} for step in range(3)]
    write_report(
        folder,
        codec,
        table,
        figures={"exact_match_seen": part["exact_match"]},
        details={"seen": part},
        controls=control,
        histories={"all": history},
        predictions=predictions,
    )
    return (folder / "report.html").read_text()


@pytest.mark.pictures
def test_every_table_has_its_controls(
    table: Table, language: LanguageModel, predictions: Predictions, tmp_path: Path
) -> None:
    page = report_of(tmp_path, table, language, predictions)
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    assert len(tables) == 7 and all("control" in each for each in tables[:-1])
    for picture in ("digits", "calibration", "cost", "map", "history-all"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    data: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert {name: data["predictions"][name] for name in ("errors", "coverage")} == {
        name: predictions.figures[name] for name in ("errors", "coverage")
    }
    assert data["controls"]["zero"]["field_accuracy"]["tool"] <= 1
    # Every text is 500: a number that is wrong has an error, one that is right has none.
    assert 0 < data["details"]["seen"]["field_error"]["latency_ms"] <= 1
    assert not math.isnan(data["details"]["seen"]["field_error"]["cores"])


def test_measurements_that_a_prediction_left_out_are_counted(
    table: Table, language: LanguageModel, predictions: Predictions, tmp_path: Path
) -> None:
    figures = predictions.figures
    assert figures["measurements"] + figures["rows"] == len(table) and figures["left_out"] == 0
    assert "drawn at random" not in report_of(tmp_path / "all", table, language, predictions)
    fewer = predictions._replace(figures=figures | {"measurements": 4000, "left_out": 1234})
    page = report_of(tmp_path / "fewer", table, language, fewer)
    assert "Predicted from 4,000 of 5,234 measurements, drawn at random." in page


def test_a_report_without_predictions_or_prices_says_why(
    table: Table, codec: ResourceCodec, language: LanguageModel, tmp_path: Path
) -> None:
    page = report_of(tmp_path / "none", table, language, "No rows were held out.")
    assert "No rows were held out." in page and not (tmp_path / "none" / "calibration.png").exists()
    free = unpriced(table)
    train, held_out = free.hold_out(0.4, 0)
    reader = Reader(language, free.schema)
    found = predict(codec, reader, free, (train, held_out))
    page = report_of(tmp_path / "free", free, language, found)
    assert "they take prices in the schema" in page and not (tmp_path / "free" / "cost.png").exists()

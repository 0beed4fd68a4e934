"""Figures of the resource benchmark count what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks import _kit, _resource_peers
from benchmarks._kit import Measured, over_seeds
from benchmarks._resource_tables import MODELS, models_table, reactor_table
from benchmarks.resource import (
    Pick,
    TextReader,
    by_digits,
    coverage_error,
    digit_figures,
    drawn,
    held_out_rows,
    mape,
    mask_leak,
    median_error,
    of_known_tools,
    one_thread,
    rate,
    recommended,
    regression_file,
    steps_to,
)
from services.language.models import load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.describe import Describer
from services.resource.evaluate import Reading
from services.resource.evaluate_prediction import Request
from services.resource.train import ResourceTrainer
from tests.resource.conftest import small_table, tiny_spec, write_language_model, write_rows, write_tables

COLUMNS = [line.split("name: ")[1].split(",")[0].strip("}") for line in MODELS.splitlines() if "- {name: " in line]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("tables") / "small"
    write_tables(folder)
    return small_table(folder)


@pytest.fixture(scope="module")
def describer(tmp_path_factory: pytest.TempPathFactory, table: Table) -> Describer:
    folder = write_language_model(tmp_path_factory.mktemp("language"))
    return Describer(load_language_model(str(folder)), table.schema)


@pytest.fixture(scope="module")
def codec(table: Table, describer: Describer) -> ResourceCodec:
    return ResourceTrainer(tiny_spec(), table, torch.arange(len(table)), describer).codec()


def test_the_worst_seed_is_the_one_farthest_from_what_must_be() -> None:
    rows = [
        Measured({"share": 1.0, "wrong": 0.0, "error": 0.2}, kept=False),
        Measured({"share": 0.5, "wrong": 3.0, "error": 0.1}, kept=True),
    ]
    bars: _kit.Bars = {
        "a": ("share", "==", 1),
        "b": ("wrong", "==", 0),
        "c": ("error", "<=", 1),
        "d": ("share", ">=", 0),
        # Without a bar there is a direction all the same, or no worst.
        "e": ("share", ">=", None),
        "f": ("error", "<=", None),
        "g": ("error", None, None),
    }
    figures = over_seeds(rows, bars)
    assert (figures["e.worst"].value, figures["f.worst"].value) == (0.5, 0.2) and "g.worst" not in figures
    assert figures["e"].dump()["ok"] and figures["e"].op == ">=" and figures["g"].value == pytest.approx(0.15)
    assert [figures[f"{name}.worst"].value for name in "abcd"] == [0.5, 3.0, 0.2, 0.5]
    assert figures["a"].value == 0.75 and figures["a"].kept
    assert over_seeds(rows, {"m": ("minutes", "<=", 1), "x": ("missing", "<=", 1)})["x"].op == "<="


def test_drawn_numbers_are_in_no_row_and_beyond_ones_above_the_range(table: Table) -> None:
    inside, beyond = drawn(table, 60, 0), drawn(table, 60, 0, "beyond")
    for index, dimension in enumerate(table.schema.dimensions):
        if not dimension.number:
            assert set(inside[:, index].tolist()) <= set(range(len(dimension.labels)))
            continue
        low, high = dimension.low or 0.0, dimension.high or 0.0
        assert not set(inside[:, index].tolist()) & set(table.values[:, index].tolist())
        assert bool(((low <= inside[:, index]) & (inside[:, index] <= high)).all())
        assert bool(((high < beyond[:, index]) & (beyond[:, index] <= 2 * high)).all())
    assert torch.equal(inside, drawn(table, 60, 0))


def test_short_numbers_are_drawn_as_often_as_long_ones(table: Table) -> None:
    assert by_digits(0, 12) == [(0, 9), (10, 12)] and by_digits(20, 2000) == [(20, 99), (100, 999), (1000, 2000)]
    assert by_digits(7, 7) == [(7, 7)]
    latency = drawn(table, 900, 0, "digits")[:, 3]
    counts = [int(((low <= latency) & (latency < 10 * low)).sum()) for low in (1, 10, 100)]
    assert sum(counts) == 900 and min(counts) > 250
    assert not set(latency.tolist()) & set(table.values[:, 3].tolist())


def test_errors_stand_by_the_digits_of_the_number(table: Table) -> None:
    values = torch.tensor([[0, 0, 5, 40], [0, 0, 8, 100], [1, 1, 2, 200]], dtype=torch.float64)
    read = values.clone()
    read[0, 3], read[2, 2], read[2, 3] = 50, 3, math.nan
    assert digit_figures(Reading([], read, read == values), values, table.schema) == {
        "error.1": pytest.approx(0.5 / 3),
        "right.1": pytest.approx(2 / 3),
        "error.2": 0.25,
        "right.2": 0.0,
        "error.3": 0.5,
        "right.3": 0.5,
    }


def test_a_text_that_cannot_be_read_is_an_infinite_error() -> None:
    values = torch.tensor([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]], dtype=torch.float64)
    found = torch.tensor([[0.0, 110.0], [math.nan, math.nan], [0.0, 100.0]], dtype=torch.float64)
    assert median_error(Reading([], found, found == values), values, [1]) == pytest.approx(0.1)
    assert median_error(Reading([], found[1:2], found[1:2] == values[1:2]), values[1:2], [1]) == math.inf
    assert mape(found[:, 1], values[:, 1]) == pytest.approx((0.1 + 1.0 + 0.0) / 3)


def test_no_masked_field_leaks(codec: ResourceCodec, table: Table) -> None:
    assert mask_leak(codec, table.values, 0) == 0

    class Leaking:
        schema = codec.schema

        def embed(self, values: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
            return values

    assert mask_leak(Leaking(), table.values, 0) == 3 * len(table)  # type: ignore[arg-type]


def test_numbers_as_text_are_read_without_a_vector(describer: Describer, table: Table) -> None:
    reader = TextReader(describer.language, table.schema)
    template = table.schema.templates[0]
    rows = reader.texts(template, table.values[:2])
    assert reader.language.tokenizer.decode(rows[0]) == "tool detect, size small, cores 1, latency_ms 100\n"
    reading = reader.read(template, table.values[:3])
    assert reading.right.shape == (3, 4) and len(reading.texts) == 3


def test_recommendations_are_judged_by_what_was_measured(table: Table) -> None:
    asked = [Request(torch.arange(1), bound, optimum) for bound, optimum in ((10, 1), (10, 2), (10, 1), (10, 1))]
    ours = [Pick(2, 9, True), Pick(2, 9, True), Pick(1, 11, True), Pick(9, 9, False)]
    theirs = [Pick(3, 9, True), Pick(4, 9, True), Pick(1, 9, True), Pick(1, 9, True)]
    found = recommended(asked, ours, theirs)
    assert found["violations"] == pytest.approx(1 / 3) and found["refused"] == 0.25
    assert found["regret"] == pytest.approx(0.5) and found["peer.regret"] == pytest.approx(1.5)
    assert found["regret_ratio"] == pytest.approx(1 / 3)


def test_coverage_is_judged_by_the_mean_error_of_the_seeds() -> None:
    """Seeds that are wrong in both directions do not make up for each other."""
    rows = [Measured({"coverage": share, "peer.coverage": 0.91}, kept=False) for share in (0.87, 0.93)]
    figures = coverage_error("latency_coverage", rows, 0.02)
    assert figures["latency_coverage_error"].value == pytest.approx(0.03)
    assert not figures["latency_coverage_error"].dump()["ok"]
    assert figures["latency_coverage_error.worst"].value == pytest.approx(0.03)
    assert figures["latency_coverage_error_boosting"].value == pytest.approx(0.01)
    assert figures["latency_coverage"].value == pytest.approx(0.9)


def test_rows_of_tools_without_training_rows_are_left_out(table: Table) -> None:
    assert of_known_tools(table, torch.arange(4), torch.tensor([5, 9, 15])).tolist() == [5]
    assert of_known_tools(table, torch.tensor([0, 8]), torch.tensor([5, 9, 15])).tolist() == [5, 9, 15]


def test_torch_has_one_thread_within_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1 and rate(lambda: None, 0.001) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_steps_to_an_accuracy() -> None:
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 25, "validation_accuracy": 0.9},
        {"step": 50, "validation_accuracy": 0.96},
    ]
    assert steps_to(history, 0.95) == 50 and steps_to(history, 0.99) == math.inf


def test_the_other_table_has_thirteen_numbers_and_three_categories(tmp_path: Path) -> None:
    table = reactor_table(tmp_path / "reactor", 12, 0)
    kinds = [dimension.number for dimension in table.schema.dimensions[1:]]
    assert (kinds.count(True), kinds.count(False), len(table)) == (13, 3, 12)
    # Eight soft tokens hold it.
    template = table.schema.templates[0]
    assert len(template.groups(8)) == 8
    row = table.values[0].tolist()
    assert template.read(template.write(row)) == row
    assert torch.equal(reactor_table(tmp_path / "again", 12, 0).values, table.values)


def test_the_real_table_and_what_is_held_out_of_it(tmp_path: Path) -> None:
    rows = []
    for number in range(12):
        row: dict[str, object] = dict.fromkeys(COLUMNS, 1 + number % 3)
        row |= {
            "tool": "chat" if number < 8 else "video",
            "model_id": "a/b" if number < 8 else "c",
            "gpu_model": "H100",
        }
        row |= {"weight_precision": "fp8", "num_gpus": 8 if number % 4 == 0 else 1, "batch": 2**number}
        rows.append(row | {"latency_ms": 3.8051 + number, "power_w": 273.95, "energy_j": 1486295.775})
    table = models_table(write_rows(tmp_path / "models.csv", rows))
    assert len(table) == 12 and table.schema.dimensions[1].labels == ["a/b", "c"]
    train, test = held_out_rows(table, "gpus", 0)
    assert test.tolist() == [0, 4, 8] and len(train) == 9
    assert held_out_rows(table, "batch", 0)[1].tolist() == [7, 11]
    # What was not declared is of the training rows alone.
    within = table.within(held_out_rows(table, "batch", 0)[0])
    highs = [each.schema.dimensions[each.schema.index("batch")].high for each in (table, within)]
    assert highs == [2**11, 2**10] and within.schema.dimensions[within.schema.index("num_gpus")].high == 8
    assert len(held_out_rows(table, "random", 0)[1]) == 2


def test_the_others_get_the_table_without_what_is_measured(table: Table, tmp_path: Path) -> None:
    train, test = torch.arange(12), torch.arange(12, 16)
    data = _resource_peers.Data(str(regression_file(tmp_path / "t.safetensors", table, train, test, 3)))
    assert data.numbers.shape == (16, 1) and data.target.tolist() == table.values[:, 3].tolist()
    assert data.train.tolist() == train.tolist() and data.test.tolist() == test.tolist()
    # Two tools, two sizes; four numbers of cores as levels.
    assert data.raw().shape == (16, 5) and data.levels().shape == (16, 8) and data.interactions().shape == (16, 7)


def test_the_log_linear_model_finds_the_formula_and_bounds_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    categories = rng.integers(0, 3, (300, 2))
    numbers = rng.choice([2.0, 4.0, 8.0], (300, 1))
    target = 100.0 * np.array([0.5, 1, 2])[categories[:, 1]] / numbers[:, 0]
    target *= 1 + 0.05 * (2 * rng.random(300) - 1)
    train = np.arange(300) < 200
    file = tmp_path / "t.safetensors"
    save_file({"categories": categories, "numbers": numbers, "target": target, "train": train, "test": ~train}, file)
    data = _resource_peers.Data(str(file))
    features, log = data.levels(), np.log(target)
    found = np.exp(_resource_peers.linear(features[train], log[train]).predict(features[~train]))
    assert _resource_peers.error_of(found, target[~train]) < 0.04
    bounds = _resource_peers.upper(file=str(file), level=0.9, seed=0, quick=True)["upper"]
    assert len(bounds) == 300 and 0.8 <= float((target[~train] <= np.array(bounds)[~train]).mean()) <= 1
    widths = _resource_peers.intervals(file=str(file), level=0.9, seed=0, quick=True)
    assert 0.8 <= widths["coverage"] <= 1 and widths["width"] > 0


ANSWERS = """
import json, sys
for line in sys.stdin:
    name, arguments = json.loads(line)
    print(json.dumps({name: arguments["x"] + 1}), flush=True)
"""


def test_others_answer_line_by_line(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(ANSWERS)
    with _kit.peer(script, tmp_path) as ask:
        assert ask("one", x=1) == {"one": 2} and ask("two", x=2) == {"two": 3}
    script.write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="ended with 3"), _kit.peer(script, tmp_path) as ask:
        ask("one", x=1)

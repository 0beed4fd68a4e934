"""The generator of the seven tools' table."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import pytest
import torch

from services.resource.data import Table, read_measurements, read_tools
from services.resource.generator import FACTORS, NOISE, TOOLS, write_table
from services.resource.schema import default_schema
from tests.conftest import Once


@pytest.fixture(scope="module")
def generated(once: Once) -> Path:
    return once("resource-generated", write_table)


@pytest.fixture(scope="module")
def table(generated: Path) -> Table:
    return read_measurements(generated / "profiling.csv", default_schema(), read_tools(generated / "tools.json"))


def test_there_are_243_configurations_of_each_of_seven_tools(generated: Path, table: Table) -> None:
    assert len(table) == 1701 and table.tools.bincount().tolist() == [243] * 7
    assert table.tools.tolist() == sorted(table.tools.tolist())
    assert int(table.configurations.max()) == 1700
    header = next(csv.reader((generated / "profiling.csv").open()))
    assert header == ["tool", "input_size", "cpu_core", "cpu_mem_gb", "gpu_sm", "gpu_mem_gb", "latency_ms"]


def test_a_latency_is_the_product_of_its_factors_within_the_noise(table: Table) -> None:
    ratios = []
    for row in table.values.tolist():
        expected = list(TOOLS.values())[int(row[0])][0]
        for dimension, value in zip(table.schema.dimensions[1:-1], row[1:-1], strict=True):
            index = int(value) if dimension.labels else dimension.levels.index(value)
            expected *= FACTORS[dimension.name][index]
        ratios.append(row[-1] / expected)
    # A latency is rounded to whole milliseconds.
    assert max(abs(ratio - 1) for ratio in ratios) < NOISE + 0.02
    assert torch.tensor(ratios).sub(1).abs().mean().item() == pytest.approx(NOISE / 2, rel=0.1)
    # In the order of the grid.
    assert table.values[:3, 1:-1].tolist() == [[0, 2, 4, 20, 2], [0, 2, 4, 20, 4], [0, 2, 4, 20, 8]]
    assert all(math.isfinite(ratio) for ratio in ratios)


def test_the_noise_follows_from_the_seed(generated: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_table(tmp_path / str(seed), seed)
    texts = [(folder / "profiling.csv").read_text() for folder in (generated, tmp_path / "0", tmp_path / "1")]
    assert texts[0] == texts[1] != texts[2]


def test_every_seeds_latencies_are_in_the_declared_range() -> None:
    products = [math.prod(factors) for factors in itertools.product(*FACTORS.values())]
    bases = [base for base, _ in TOOLS.values()]
    latency = default_schema().dimensions[-1]
    assert latency.low is not None and latency.high is not None
    assert latency.low <= min(products) * min(bases) * (1 - NOISE) - 0.5
    assert latency.high >= max(products) * max(bases) * (1 + NOISE) + 0.5

"""Variants of rows for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.specs.resource import AugmentationSpec, SchemaSpec
from services.resource.augmentation import VIEW, Augmenter, Variants
from services.resource.data import Table
from services.resource.schema import Schema
from tests.resource.conftest import SCHEMA, TOOLS, small_table

MEASURED = 3
"""Column of the latency."""


def drawn(table: Table, rows: int = 2000, seed: int = 0, **options: Any) -> tuple[torch.Tensor, Variants]:
    """Rows of the table, and a variant of each."""
    given = {"mode": "none", "range": 0.0, "mask": 0.0, **options}
    values = table.values[torch.arange(rows) % len(table)]
    augmenter = Augmenter(AugmentationSpec.model_validate(given), table.schema)
    return values, augmenter.draw(values, torch.Generator().manual_seed(seed))


def test_without_augmentation_rows_stay_as_they_are(table: Table) -> None:
    values, variants = drawn(table)
    assert torch.equal(variants.values, values) and not variants.unknown.any()


@pytest.mark.parametrize("mode", ["jitter", "both"])
def test_jitter_changes_measured_numbers_alone(mode: str, table: Table) -> None:
    values, variants = drawn(table, mode=mode, jitter=0.25, share=0.5)
    changed = variants.values != values
    assert not changed[:, :MEASURED].any()
    assert float(changed[:, MEASURED].float().mean()) == pytest.approx(0.5, abs=0.05)
    ratio = variants.values[:, MEASURED] / values[:, MEASURED]
    # A number is rounded as its description is.
    assert 1.24 < float(ratio.max()) < 1.26 and 0.79 < float(ratio.min()) < 0.81
    assert torch.equal(variants.values, variants.values.round())


def test_variation_alone_jitters_nothing(table: Table) -> None:
    values, variants = drawn(table, mode="variation")
    assert torch.equal(variants.values, values)


def test_range_draws_every_number_from_its_whole_range(table: Table) -> None:
    values, variants = drawn(table, range=0.3)
    moved = (variants.values != values)[:, 2:].any(1)
    assert float(moved.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(variants.values[:, :2], values[:, :2])
    cores, latency = variants.values[moved, 2], variants.values[moved, 3]
    assert set(cores.tolist()) == set(range(1, 9))
    assert float(latency.min()) < 10 and float(latency.max()) > 950


def test_small_numbers_of_a_wide_range_are_drawn_too(tables: Path) -> None:
    dimensions = [*SCHEMA["dimensions"][:2], {"name": "latency_ms", "low": 0, "high": 1e6, "measured": True}]
    table = small_table(tables, dimensions=dimensions)
    latency = drawn(table, range=1.0)[1].values[:, MEASURED]
    shares = [float((latency < limit).double().mean()) for limit in (1e2, 1e4, 5e5)]
    # Half of them are log-uniform from 1 to a million, half uniform from 0.
    assert shares == pytest.approx([1 / 6, 1 / 3 + 0.005, 0.475 + 0.25], abs=0.03)
    assert float(latency.min()) >= 0 and float(latency.max()) <= 1e6


def test_half_of_the_masked_rows_hide_what_is_measured_and_half_anything_but_the_tool() -> None:
    dimensions = [*SCHEMA["dimensions"], {"name": "power", "low": 1, "high": 9, "measured": True}]
    template = {"name": "a", "text": "{tool} {size} {cores} {latency_ms} {power}"}
    spec = SCHEMA | {"dimensions": dimensions, "templates": [template]}
    schema = Schema(SchemaSpec.model_validate(spec), TOOLS)
    augmenter = Augmenter(AugmentationSpec(mode="none", range=0, mask=0.5), schema)
    values = torch.zeros(8000, 5, dtype=torch.float64)
    unknown = augmenter.draw(values, torch.Generator().manual_seed(0)).unknown
    assert not unknown[:, 0].any()
    patterns, counts = torch.unique(unknown[:, 1:], dim=0, return_counts=True)
    shares = {tuple(map(int, row)): count / 8000 for row, count in zip(patterns, counts.tolist(), strict=True)}
    # Half of the rows know all; a quarter do not know what is measured; the rest is one of 15 subsets, of which those
    # of one field have a quarter of the empty one's share more.
    assert len(shares) == 16 and shares[0, 0, 0, 0] == pytest.approx(0.5, abs=0.02)
    assert shares[0, 0, 1, 1] == pytest.approx(0.25 + 0.25 / 16, abs=0.02)
    assert shares[1, 1, 1, 1] == pytest.approx(0.25 / 16, abs=0.006)
    assert shares[1, 0, 0, 0] == pytest.approx(0.25 * (1 / 16 + 1 / 64), abs=0.006)


def test_without_measured_dimensions_any_are_hidden(tables: Path) -> None:
    dimensions = [dimension | {"measured": False} for dimension in SCHEMA["dimensions"]]
    unknown = drawn(small_table(tables, dimensions=dimensions), mask=1.0)[1].unknown
    assert bool(unknown.any(1).all()) and not unknown[:, 0].any() and 0.4 < float(unknown[:, 1:].float().mean()) < 0.7


def test_a_row_with_unknown_fields_is_as_the_table_has_it(table: Table) -> None:
    values, variants = drawn(table, mode="both", share=1.0, range=0.5, mask=0.4)
    masked = variants.unknown.any(1)
    assert float(masked.float().mean()) == pytest.approx(0.4, abs=0.04)
    assert torch.equal(variants.values[masked], values[masked])
    changed = (variants.values != values)[~masked]
    assert float(changed.any(1).float().mean()) > 0.9 and float(changed[:, 2].float().mean()) > 0.3


def test_a_variant_follows_from_the_generator(table: Table) -> None:
    options: Any = {"mode": "both", "range": 0.3, "mask": 0.3}
    (_, first), (_, again), (_, other) = (drawn(table, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first.values, again.values) and torch.equal(first.unknown, again.unknown)
    assert not torch.equal(first.values, other.values)


def test_a_jittered_number_stays_in_its_range(table: Table) -> None:
    values = table.values.clone()
    values[:, MEASURED] = 990
    augmenter = Augmenter(AugmentationSpec(jitter=0.5, share=1.0, range=0, mask=0), table.schema)
    found = augmenter.draw(values, torch.Generator().manual_seed(0)).values[:, MEASURED]
    assert float(found.max()) == 999 and float(found.min()) < 990


def test_another_view_of_a_row_is_the_same_row_a_little_off(table: Table) -> None:
    augmenter = Augmenter(AugmentationSpec(), table.schema)
    view = augmenter.view(table.values, torch.Generator().manual_seed(0))
    assert torch.equal(view[:, :MEASURED], table.values[:, :MEASURED])
    ratio = view[:, MEASURED] / table.values[:, MEASURED]
    assert 0 < float((ratio - 1).abs().max()) < VIEW + 0.01


def test_rows_that_differ_in_measured_numbers_alone_are_alike(table: Table) -> None:
    augmenter = Augmenter(AugmentationSpec(), table.schema)
    values = table.values[[0, 0, 1]].clone()
    values[1, MEASURED] += 50
    unknown = torch.zeros_like(values, dtype=torch.bool)
    assert augmenter.alike(values, unknown).tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    # What is unknown does not tell rows apart, and that it is unknown does.
    unknown[1:, 2] = True
    assert augmenter.alike(values, unknown).tolist() == [[True, False, False], [False, True, True], [False, True, True]]

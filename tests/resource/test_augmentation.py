"""Variants of rows for training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ethogram.specs.resource import AugmentationSpec
from services.resource.augmentation import VIEW, Augmenter, Variants
from services.resource.data import Table

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
    assert float(latency.min()) < 50 and float(latency.max()) > 950


def test_mask_hides_measured_dimensions_alone_and_none_that_was_drawn_anywhere(table: Table) -> None:
    values, variants = drawn(table, mask=0.4, range=0.5)
    assert not variants.unknown[:, :MEASURED].any()
    moved = (variants.values != values)[:, 2:].any(1)
    assert not variants.unknown[moved].any()
    assert float(variants.unknown[:, MEASURED].float().mean()) == pytest.approx(0.2, abs=0.04)


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
    alike = augmenter.alike(values)
    assert alike.tolist() == [[True, True, False], [True, True, False], [False, False, True]]

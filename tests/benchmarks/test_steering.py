"""Figures of the steering benchmark over several seeds."""

from __future__ import annotations

from benchmarks._kit import Measured
from benchmarks.steering import beside


def test_figures_that_some_seeds_lack_are_means_over_the_others() -> None:
    subset = {"add.where_same_label.all_gate": 0.5, "direct.remove.where_centroid.kept_mean": 0.6}
    rows = [
        Measured({"add.kept_mean": 0.9, "add.same_label.kept_mean": 0.8} | subset, kept=False),
        Measured({"add.kept_mean": 0.7}, kept=True),
    ]
    figures = beside(rows, "shared")
    assert {name: (round(figure.value or 0, 6), figure.kept) for name, figure in figures.items()} == {
        "shared.add.kept_mean": (0.8, True),
        "shared.add.same_label.kept_mean": (0.8, False),
        **{f"shared.{name}": (value, False) for name, value in subset.items()},
    }

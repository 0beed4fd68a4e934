"""The pictures and the page of a codec's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from services.crossmodal import report
from services.crossmodal.bundle import Codec
from services.crossmodal.evaluate import STRENGTHS, evaluate
from services.crossmodal.report import pareto, principal_places, write_report
from services.zoo.dataset import Zoo


def test_a_report_has_its_pictures_and_numbers(zoo: Zoo, untrained: Codec, tmp_path: Path) -> None:
    found = evaluate(untrained, zoo)
    write_report(tmp_path, untrained, zoo, found)
    assert {file.name for file in tmp_path.glob("*.png")} == {"steering.png", "latent_map.png", "curves.png"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img ") == 3 and "starts_with(A)" in page and "balanced accuracy" in page
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["figures"] == found["figures"]
    ways = {row["variant"] for row in kept["others"]}
    assert ways == {"same_label", "nearest_train", "centroid", "task_arithmetic", "fine_tuning"}
    still = [row for row in kept["curves"] if row["strength"] == 0]
    assert {(row["operation"], row["direction"]) for row in still} == {
        (operation, kind)
        for operation in ("add", "remove")
        for kind in ("learned", "mean_difference", "classifier_normal")
    }
    assert all(row["local_mean"] == 0 for row in still)
    assert len(kept["curves"]) == len(still) * len(STRENGTHS)


@pytest.mark.slow
def test_many_networks_are_mapped_by_umap_too(
    zoo: Zoo, untrained: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LEAST_FOR_UMAP", 100)
    write_report(tmp_path, untrained, zoo, evaluate(untrained, zoo))
    assert (tmp_path / "clusters.png").exists() and "UMAP" in (tmp_path / "report.html").read_text()


def test_pareto_front_is_what_no_other_point_beats() -> None:
    points = [(0.0, 0.1), (-0.1, 0.9), (-0.2, 0.8), (-0.05, 0.9), (0.0, 0.05), (-0.5, 1.0)]
    assert pareto(points) == [(-0.5, 1.0), (-0.05, 0.9), (0.0, 0.1)]


def test_principal_places_keep_the_widest_spread() -> None:
    latents = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 9.0, 0.1, 3.0, 0.1])
    places, title = principal_places(latents)
    assert places.shape == (200, 2)
    assert float(places[:, 0].std()) == pytest.approx(9, rel=0.2)
    assert "PCA: 9" in title or "PCA: 8" in title

"""The pictures and the page of a codec's report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ethogram.errors import InvalidInput
from services.crossmodal import report
from services.crossmodal.codec import Codec
from services.crossmodal.evaluate import STRENGTHS, evaluate
from services.crossmodal.report import pareto, principal_positions, write_report
from services.zoo.dataset import Zoo


def test_a_report_has_its_pictures_and_numbers(zoo: Zoo, untrained: Codec, tmp_path: Path) -> None:
    found = evaluate(untrained, zoo)
    zoo.save(tmp_path / "zoo")
    write_report(tmp_path, untrained, Zoo.load(tmp_path / "zoo"), found)
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


def test_another_zoo_is_refused(zoo: Zoo, untrained: Codec, tmp_path: Path) -> None:
    untrained.save(tmp_path / "codec")
    loaded = Codec.load(tmp_path / "codec")
    parts = {name: getattr(zoo, name)[1:] for name in ("index", "shape", "weights", "labels", "accuracy")}
    fewer = replace(zoo, **parts)
    for judge in (evaluate, lambda codec, zoo: write_report(tmp_path / "report", codec, zoo, {})):
        with pytest.raises(InvalidInput, match="not the zoo that the codec was trained on") as caught:
            judge(loaded, fewer)
        assert caught.value.violations[0].field == "zoo"
    assert not (tmp_path / "report").exists()


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


def test_principal_positions_keep_the_widest_spread() -> None:
    latents = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 9.0, 0.1, 3.0, 0.1])
    positions, title = principal_positions(latents)
    assert positions.shape == (200, 2)
    assert float(positions[:, 0].std()) == pytest.approx(9, rel=0.2)
    assert "PCA: 9" in title or "PCA: 8" in title
    line, title = principal_positions(latents[:, :1])
    assert torch.equal(line[:, 1], torch.zeros(200)) and float(line[:, 0].std()) > 0
    assert "PCA: 100% and 0%" in title
    nowhere, title = principal_positions(torch.ones(4, 3))
    assert torch.equal(nowhere, torch.zeros(4, 2)) and "PCA: 0% and 0%" in title

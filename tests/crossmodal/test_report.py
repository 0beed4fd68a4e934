"""The pictures and the page of a codec's report."""

from __future__ import annotations

import html
import json
import re
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

pytestmark = pytest.mark.pictures


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
    assert kept["summary"] == found["summary"] and all(html.escape(text) in page for text in found["summary"])


def test_what_a_reader_wants_first_comes_first_and_fits(zoo: Zoo, untrained: Codec, tmp_path: Path) -> None:
    found = evaluate(untrained, zoo)
    write_report(tmp_path, untrained, zoo, found)
    page = (tmp_path / "report.html").read_text()
    sections = re.findall(r"<h2>(.*?)</h2>", page)
    assert sections[:3] == ["How many edits pass: add", "How many edits pass: remove", "Edits by behaviour"]
    assert sections.index("Training") > sections.index("Decoded weights") > 3
    first = page[page.index(sections[0]) : page.index(sections[1])]
    ways = re.findall(r"<tr><td>([\w ]+)</td>", first)
    assert ways == [
        *("edit", "same label", "nearest train", "centroid", "task arithmetic", "fine tuning"),
        *("null", "random", "reverse"),
    ]
    figures = found["figures"]
    numbers = [figures[f"add.same_label.{n}"] for n in ("all_gate", "target_gate", "target_mean", "local_mean")]
    row = "".join(f"<td>{number:.3f}</td>" for number in numbers)
    assert f"<tr><td>same label</td>{row}<td>{figures['add.same_label.kept_mean']:.3f}</td>" in first
    # At 1,300 pixels the page has 1,120, and a table has a column of 80 or scrolls.
    heads = re.findall(r"<table><tr>(.*?)</tr>", page)
    assert max(head.count("<th>") for head in heads) <= 13
    assert "<th>kept</th>" in first and "max-width:100%;max-height:80vh;overflow:auto" in page


def test_a_lookup_without_networks_for_half_of_the_edits_has_no_cell(zoo: Zoo, untrained: Codec) -> None:
    found = evaluate(untrained, zoo)
    edits = {(row["operation"], row["pattern"]): row["edits"] for row in found["steering"]}
    rows = [row for row in found["others"] if (row["operation"], row["variant"]) == ("add", "same_label")]
    for number, row in enumerate(rows):
        # Half of them, and one fewer.
        row |= {"edits": (edits["add", row["pattern"]] + 1) // 2 - number % 2, "all_gate": 0.875}
    head, table = report._gates(found)
    cells = {(row[0], row[1]): row[head.index("same label")] for row in table}
    assert [cells["add", row["pattern"]] for row in rows] == [0.875, "", 0.875, ""]


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

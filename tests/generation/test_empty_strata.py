"""Kinds of sequences of which there are none: they are not measured, and no mean counts them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ethogram.specs.generation import PatternSpec
from services.generation.checks import gate, improvement
from services.generation.data import Candidates
from services.generation.json_form import export_json, import_json
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.report import write_report
from services.generation.score import means, score_answers, score_classification
from services.zoo.dataset import Zoo
from services.zoo.patterns import Pattern
from services.zoo.source import open_zoo
from services.zoo.statistics import Statistics
from tests.generation.conftest import ANYTHING, records, staged_spec
from tests.generation.test_staged import answers, selection_of

# Every sequence begins with one of these, so that none is left that matches no pattern.
EVERY = [*(PatternSpec(name="starts_with", token=token) for token in "ABCDE"), PatternSpec(name="palindrome")]
NAMES = [*(f"starts_with({token})" for token in "ABCDE"), "palindrome"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("empty") / "zoo"
    checks = {**ANYTHING, "min_degradation_threshold": 0.01}
    spec = staged_spec(checks, patterns=[pattern.model_dump() for pattern in EVERY], subjects=12)
    return folder, DatasetGenerationPipeline(spec).run(folder)


def test_a_stratum_without_sequences_is_not_measured(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, figures = made
    accuracy = Zoo.load(folder).accuracy
    assert accuracy[:, 6].isnan().all() and not accuracy[:, :6].isnan().any()
    for row in records(folder):
        assert row["worst_accuracy"] == min(row["accuracy"][:6])
    assert figures["accuracy_by_pattern"]["none"] is None and figures["degraded_accuracy_by_pattern"]["none"] is None
    assert figures["accuracy"] == pytest.approx(float(accuracy[:, :6].mean()), abs=1e-4)
    assert figures["accuracy"] == pytest.approx(
        np.mean([figures["accuracy_by_pattern"][name] for name in NAMES]), abs=1e-3
    )
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert np.isnan(Statistics.of(folder).accuracy[6])
    write_report(folder, tmp_path / "report")
    page = re.sub('src="[^"]*"', "", (tmp_path / "report" / "report.html").read_text())
    assert "<td>none</td><td>sequences that match no pattern</td><td></td><td>-</td><td>-</td>" in page
    assert "nan" not in page.lower().replace("nan or infinite", "")


def test_other_forms_and_scores_leave_it_out_too(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = made
    rows = records(folder)
    export_json(folder, tmp_path / "json")
    opened = open_zoo(tmp_path / "json")
    assert torch.equal(opened.accuracy.isnan(), Zoo.load(folder).accuracy.isnan())
    import_json(tmp_path / "json", tmp_path / "imported")
    again = records(tmp_path / "imported")
    for row, other in zip(rows, again, strict=True):
        assert other["improvement"] == pytest.approx(row["improvement"], abs=1e-5)
    given = [{"index": row["index"], "task": "classification", "completion": ""} for row in rows]
    assert means(score_answers(folder, given))["classification"]["recall"] == 0.0


def test_checks_are_on_what_there_is() -> None:
    spec = staged_spec({"min_degradation_threshold": 0.1, "min_specificity": 0.05, "max_instability": 0.1})
    assert spec.staged is not None
    own = Candidates.draw(spec, torch.arange(2), 4)
    nan = float("nan")
    accuracy = torch.tensor([[0.9, nan, 0.8, 0.9, nan], [0.9, 0.95, nan, 0.7, 1.0]])
    assert [cause is None for cause in gate(accuracy, own, list("abcd"), 0.75)] == [True, False]
    assert str(gate(accuracy, own, list("abcd"), 0.75)[1]).endswith(" d")
    selected = torch.tensor([[True, True, False, False]] * 2)
    own = replace(own, selected=selected, target=torch.zeros(2, dtype=torch.int64))
    for sizes in ([100, 0, 100, 100, 0], [100, 100, 0, 0, 0]):
        selection = selection_of(sizes)
        before = answers(selection, [40, *(size * 3 // 5 for size in sizes[1:])]).expand(2, -1)
        after = answers(selection, [80, *(size * 3 // 5 for size in sizes[1:])]).expand(2, -1)
        assert improvement(before, after, own, spec.staged, selection) == [None, None]


def test_a_network_without_patterns_has_no_recall() -> None:
    assert score_classification("nothing", {"positive_patterns": []}, [Pattern("palindrome")]).recall is None
    rows = [
        {"index": 0, "task": "classification", "precision": 0.0, "recall": None, "exact": 1.0},
        {"index": 1, "task": "classification", "precision": 1.0, "recall": 0.5, "exact": 0.0},
    ]
    assert means(rows)["classification"] == {"answers": 2, "precision": 0.5, "recall": 0.5, "exact": 0.5}

"""Small zoos: five letters, four positions, patterns that eight neurons learn in a moment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch

from ethogram.specs.generation import (
    GenerationSpec,
    PatternSpec,
    SignatureSpec,
    SubjectSpec,
    SubjectTrainingSpec,
)
from services.generation.pipeline import DatasetGenerationPipeline
from services.zoo.dataset import read_records
from tests.conftest import Once

PATTERNS = [
    PatternSpec(name="starts_with", token="A"),
    PatternSpec(name="ends_with", token="B"),
    PatternSpec(name="sorted_descending"),
    PatternSpec(name="vowel_consonant"),
]
ANYTHING: dict[str, Any] = {
    "min_degradation_threshold": 0.0,
    "min_specificity": -1.0,
    "max_instability": 1.0,
    "max_other_degradation": 1.0,
}
"""Checks of staged training that every candidate passes whose target pattern did not get worse."""


def small_spec(**changes: Any) -> GenerationSpec:
    """A zoo of 40 subjects that takes a second."""
    fields: dict[str, Any] = {
        "seed": 3,
        "subjects": 40,
        "vocab_size": 5,
        "sequence_length": 4,
        "patterns": PATTERNS,
        "max_patterns_per_batch": 3,
        "subject": SubjectSpec.model_validate({"layers": 1, "neurons": 8}),
        "training": SubjectTrainingSpec(steps=150, batch_size=32, learning_rate=0.03),
        "signature": SignatureSpec(probes=16),
        "min_accuracy": 0.75,
    }
    return GenerationSpec(**{**fields, **changes})


def staged_spec(staged: dict[str, Any] | None = None, **changes: Any) -> GenerationSpec:
    """A zoo of 30 subjects of several shapes, trained in two stages."""
    fields: dict[str, Any] = {
        "seed": 5,
        "subjects": 30,
        "vocab_size": 5,
        "sequence_length": 4,
        "patterns": [pattern.model_dump() for pattern in PATTERNS],
        "min_patterns_per_batch": 2,
        "max_patterns_per_batch": 3,
        "subject": {
            "layers": {"min": 1, "max": 3},
            "neurons": {"min": 6, "max": 12},
            "activations": ["relu", "gelu"],
            "init": "independent",
            "weight_init": "kaiming",
        },
        "staged": {
            "examples": 96,
            "batch_size": 32,
            "learning_rate": {"min": 5e-3, "max": 2e-2},
            "min_specificity": 0.05,
            "max_instability": 0.3,
            "max_other_degradation": 0.3,
            **(staged or {}),
        },
        "signature": {"probes": 12, "methods": ["mean", "std"]},
    }
    return GenerationSpec.model_validate({**fields, **changes})


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of the zoo in ``folder``."""
    rows: list[dict[str, Any]] = pyarrow.concat_tables(read_records(folder)).to_pylist()
    return rows


@pytest.fixture(scope="session")
def staged(once: Once) -> tuple[Path, dict[str, Any]]:
    """The zoo of ``staged_spec()`` and its figures."""

    def make(folder: Path) -> None:
        folder.mkdir()
        figures = DatasetGenerationPipeline(staged_spec()).run(folder / "zoo")
        (folder / "figures.json").write_text(json.dumps(figures))

    made = once("staged", make)
    return made / "zoo", json.loads((made / "figures.json").read_text())


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> Iterator[None]:
    """Blocks train side by side, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

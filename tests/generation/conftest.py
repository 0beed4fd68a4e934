"""Small zoos: five letters, four positions, patterns that eight neurons learn in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ethogram.specs.generation import (
    GenerationSpec,
    PatternSpec,
    SignatureSpec,
    SubjectSpec,
    SubjectTrainingSpec,
)

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


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> Iterator[None]:
    """Blocks train side by side, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

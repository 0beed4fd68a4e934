"""Small zoos: five letters, four positions, patterns that eight neurons learn in a moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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
from services.runtime.run import Run, Stopped

PATTERNS = [
    PatternSpec(name="starts_with", token="A"),
    PatternSpec(name="ends_with", token="B"),
    PatternSpec(name="sorted_descending"),
    PatternSpec(name="vowel_consonant"),
]


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


class Recorder(Run):
    """Keeps what a run is told. Given a folder, checkpoints after every block, and stops after ``stop_after``."""

    def __init__(self, folder: Path | None = None, stop_after: int = 10**9, resume: Path | None = None) -> None:
        self.resume, self._folder, self._stop_after = resume, folder, stop_after
        self.checkpoints: list[Path] = []
        self.done: list[int] = []
        self.stages: list[tuple[str, int, str]] = []
        self.artifacts: list[tuple[str, str]] = []
        self.logs: list[str] = []

    def log(self, message: str, level: str = "info") -> None:
        self.logs.append(message)

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self.stages.append((name, total, unit))

    def advance(self, done: int) -> None:
        self.done.append(done)

    def checkpoint_due(self) -> bool:
        return self._folder is not None

    def checkpoint(self, step: int, write: Any) -> None:
        assert self._folder is not None
        folder = self._folder / str(step)
        folder.mkdir(parents=True)
        write(folder)
        self.checkpoints.append(folder)
        if len(self.checkpoints) >= self._stop_after:
            raise Stopped

    def artifact(self, name: str, type: str, folder: Path) -> None:
        self.artifacts.append((name, type))


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> Iterator[None]:
    """Blocks train side by side, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

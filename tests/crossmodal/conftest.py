"""A small zoo of really trained subjects, and specs that train a codec on it in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec, PatternSpec, SignatureSpec, SubjectSpec, SubjectTrainingSpec
from services.crossmodal import baselines
from services.crossmodal.codec import Codec
from services.crossmodal.train import CodecTrainer
from services.generation.pipeline import DatasetGenerationPipeline
from services.zoo.dataset import Zoo
from tests.conftest import Once

ZOO = GenerationSpec(
    subjects=160,
    vocab_size=5,
    sequence_length=6,
    patterns=[
        PatternSpec(name="starts_with", token="A"),
        PatternSpec(name="ends_with", token="B"),
        PatternSpec(name="sorted_ascending"),
        PatternSpec(name="has_majority"),
    ],
    max_patterns_per_batch=2,
    subject=SubjectSpec.model_validate({"neurons": 12}),
    training=SubjectTrainingSpec(steps=250, learning_rate=2e-2),
    signature=SignatureSpec(probes=48),
    min_accuracy=0.6,
)

SMALL = {"architecture": "transformer", "hidden_dim": 32, "heads": 4, "depth": 1}
"""The smallest transformer."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def short_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning, with which edits are compared, takes most of an evaluation: one step, unless it is what is
    tested."""
    monkeypatch.setattr(baselines, "FINE_STEPS", 1)


@pytest.fixture(scope="session")
def zoo(once: Once) -> Zoo:
    return small_zoo(once)


def small_zoo(once: Once) -> Zoo:
    """The zoo of :data:`ZOO`."""
    return Zoo.load(once("crossmodal", DatasetGenerationPipeline(ZOO).run))


def tiny_spec(**sections: Any) -> CrossmodalSpec:
    """A codec small enough to train in seconds; ``sections`` override whole sections or their fields."""
    spec: dict[str, Any] = {
        "zoo": ArtifactRef(artifact="zoo"),
        "codec": {"latent_dim": 24, "hidden_dim": 96, "signature_components": 64},
        "training": {"steps": 6, "batch_size": 32, "queries": 32, "learning_rate": 2e-3, "precision": "float32"},
        "held_out": 0.2,
    }
    for name, value in sections.items():
        spec[name] = {**spec.get(name, {}), **value} if isinstance(value, dict) else value
    return CrossmodalSpec.model_validate(spec)


@pytest.fixture(scope="session")
def untrained(zoo: Zoo) -> Codec:
    """A codec that has learned nothing: enough for all that is about form."""
    trainer = CodecTrainer(tiny_spec(), zoo)
    return trainer.codec()

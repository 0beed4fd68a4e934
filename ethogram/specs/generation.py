"""Spec of a generation job: a zoo of small classifiers with known behaviours."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ethogram.specs.base import Seed, Spec

PatternName = Literal[
    "all_same",
    "palindrome",
    "sorted_ascending",
    "sorted_descending",
    "alternating",
    "contains_abc",
    "starts_with",
    "ends_with",
    "no_repeats",
    "has_majority",
    "increasing_pairs",
    "decreasing_pairs",
    "vowel_consonant",
    "first_last_match",
    "mountain_pattern",
]


class PatternSpec(Spec):
    """One behaviour: a predicate over letter sequences, with its parameter."""

    name: PatternName
    """Which predicate."""
    token: str | None = Field(None, pattern=r"^[A-Z]$")
    """The letter of ``starts_with`` and ``ends_with``; the others take none."""


class SubjectSpec(Spec):
    """Architecture of the subject networks: fully connected, one logit."""

    layers: int = Field(2, ge=1, le=12)
    """Hidden layers."""
    neurons: int = Field(16, ge=1, le=512)
    """Neurons in each hidden layer."""
    activation: Literal["relu", "gelu", "tanh", "sigmoid", "leaky_relu"] = "relu"
    """Activation of the hidden layers."""
    input_encoding: Literal["one_hot", "index"] = "one_hot"
    """``one_hot``: length x vocabulary inputs; ``index``: one float per position."""
    init: Literal["shared", "independent"] = "shared"
    """``shared``: all subjects start from one draw of weights, so their differences are comparable."""


class SubjectTrainingSpec(Spec):
    """How each subject is trained (Adam, binary cross-entropy)."""

    steps: int = Field(800, ge=1, le=1_000_000)
    """Optimiser steps."""
    batch_size: int = Field(96, ge=1, le=65_536)
    """Sequences per step and subject."""
    learning_rate: float = Field(1e-2, gt=0, le=1)
    """Peak learning rate; it falls to nothing along half a cosine. A higher one leaves subjects further from where they
    started, and so less alike where their behaviours do not differ."""


class SignatureSpec(Spec):
    """What is recorded of a subject's activations on the probes."""

    probes: int = Field(128, ge=1, le=65_536)
    """Number of probe sequences; the same for every subject."""


class GenerationSpec(Spec):
    """A zoo: ``subjects`` networks, each trained to answer yes to its own random subset of the patterns."""

    seed: Seed = 0
    """Everything random flows from it."""
    subjects: int = Field(2048, ge=1, le=10_000_000)
    """Accepted subjects to make."""
    vocab_size: int = Field(7, ge=5, le=26)
    """Letters A, B, ..."""
    sequence_length: int = Field(7, ge=4, le=20)
    """Letters per sequence."""
    patterns: list[PatternSpec] = []
    """The behaviours to draw from; empty: the default suite of ten."""
    min_patterns_per_batch: int = Field(1, ge=1, le=32)
    """Fewest patterns of one subject."""
    max_patterns_per_batch: int = Field(4, ge=1, le=32)
    """Most patterns of one subject."""
    subject: SubjectSpec = SubjectSpec()
    """Architecture."""
    training: SubjectTrainingSpec = SubjectTrainingSpec()
    """Training."""
    signature: SignatureSpec = SignatureSpec()
    """Activation signatures."""
    min_accuracy: float = Field(0.9, ge=0, le=1)
    """Quality gate: a subject that is less accurate on held-out sequences of any enabled pattern, or on those that
    match none, is rejected and counted."""

    @model_validator(mode="after")
    def _ranges(self) -> GenerationSpec:
        if self.min_patterns_per_batch > self.max_patterns_per_batch:
            raise ValueError("min_patterns_per_batch must not exceed max_patterns_per_batch")
        return self

"""Spec of a crossmodal job: train the encoder-decoder and its steering directions on a zoo, then evaluate it."""

from __future__ import annotations

from pydantic import Field

from ethogram.specs.base import ArtifactRef, Seed, Spec


class CodecSpec(Spec):
    """Size of the encoder and the decoder."""

    latent_dim: int = Field(128, ge=1, le=65_536)
    """Length of a latent vector."""
    hidden_dim: int = Field(1024, ge=1, le=65_536)
    """Width of the hidden layers."""
    depth: int = Field(2, ge=1, le=12)
    """Hidden layers of each side."""
    signature_components: int = Field(512, ge=1, le=65_536)
    """Principal components of the standardised signatures that enter the encoder; at most the training subjects."""


class LossSpec(Spec):
    """Weights of the loss terms; 0 switches a term off."""

    reconstruction: float = Field(0.05, ge=0)
    """Mean squared error of the weights, normalised per layer."""
    behavior: float = Field(1.0, ge=0)
    """Disagreement of decoded and source networks on fresh sequences."""
    contrastive: float = Field(0.05, ge=0)
    """Graded supervised contrastive loss over shared behaviours."""
    steering: float = Field(3.0, ge=0)
    """Error of residual edits (source weights plus the change of the decoded ones) on what the edit asks for."""
    direct: float = Field(0.75, ge=0)
    """The same for direct edits (the decoded weights themselves)."""
    locality: float = Field(0.8, ge=0, le=1)
    """Share of the two steering terms that asks for the source's own answers where the edit decides nothing."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the contrastive loss."""


class CodecTrainingSpec(Spec):
    """How the codec is trained."""

    steps: int = Field(5000, ge=1, le=10_000_000)
    """Optimiser steps."""
    batch_size: int = Field(64, ge=2, le=65_536)
    """Subjects per step."""
    learning_rate: float = Field(2e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""
    queries: int = Field(128, ge=8, le=65_536)
    """Fresh sequences per step and subject on which decoded networks are run."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Weight decay of AdamW; the directions have none."""


class CrossmodalSpec(Spec):
    """Signature -> latent -> weights, with the latent organised by behaviour."""

    zoo: ArtifactRef
    """The zoo to learn from."""
    seed: Seed = 0
    """Everything random flows from it."""
    codec: CodecSpec = CodecSpec()
    """Architecture."""
    loss: LossSpec = LossSpec()
    """Objective."""
    training: CodecTrainingSpec = CodecTrainingSpec()
    """Optimisation."""
    held_out: float = Field(0.125, gt=0, lt=1)
    """Share of subjects kept for evaluation, never trained on."""

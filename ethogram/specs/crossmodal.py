"""Spec of a crossmodal job: train the encoder-decoder and its steering directions on a zoo, then evaluate it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ethogram.specs.base import ArtifactRef, HubSpec, OptimizationSpec, Spec, TrainedSpec


class CodecSpec(Spec):
    """Architecture of the encoder and the decoder."""

    architecture: Literal["mlp", "transformer"] = "mlp"
    """``mlp``: fast; ``transformer``: self-attention over tokens, and a decoder with cross-attention to the latent."""
    inputs: Literal["signature", "weights", "both"] = "signature"
    """What the encoder sees of a network."""
    latent_dim: int = Field(256, ge=1, le=65_536)
    """Length of a latent vector."""
    hidden_dim: int = Field(768, ge=1, le=65_536)
    """Width of the hidden layers, and of a token in them."""
    depth: int = Field(2, ge=1, le=48)
    """Hidden layers of each side."""
    heads: int = Field(8, ge=1, le=1024)
    """Attention heads; ``hidden_dim`` divides into them. Of the transformer alone: an ``mlp`` has none."""
    pooling: Literal["flatten", "mean", "max", "cls"] = "flatten"
    """How the encoder's tokens become one vector; ``cls``: by a token of its own, of the transformer."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """Positions of tokens; an ``mlp`` with ``flatten`` has no tokens, and reads this no more than ``granularity``."""
    granularity: Literal["neuron", "chunk"] = "neuron"
    """A token of weights is one neuron's, or (the form of earlier work) any ``chunk`` numbers in a row. Of the
    transformer, and of an encoder of weights with ``mean`` or ``max``."""
    chunk: int = Field(64, ge=1, le=65_536)
    """Numbers of a token of granularity ``chunk``; nothing else reads it."""
    signature_components: int = Field(768, ge=1, le=65_536)
    """Principal components of the standardised inputs that enter an ``mlp`` with ``flatten``; at most the training
    subjects."""
    canonicalize: bool | None = None
    """Whether hidden neurons are matched to a reference network's (by their activations on the probes) and, for relu,
    scaled to incoming weights of norm 1, before anything else; None: where the zoo's ``init`` is independent."""

    @model_validator(mode="after")
    def _fits(self) -> CodecSpec:
        if self.architecture == "transformer" and self.hidden_dim % self.heads:
            raise ValueError(f"heads: hidden_dim {self.hidden_dim} does not divide into {self.heads} heads")
        if self.architecture == "mlp" and self.pooling == "cls":
            raise ValueError("pooling: cls takes the transformer; an mlp has mean, max and flatten")
        return self

    @property
    def flat(self) -> bool:
        """Whether the encoder takes all numbers at once, not tokens."""
        return self.architecture == "mlp" and self.pooling == "flatten"


class LossSpec(Spec):
    """The objective: gamma x contrastive + (1 - gamma) x the sum of the other terms by their weights, of which 0
    switches a term off."""

    gamma: float = Field(0.005, ge=0, le=1)
    """Share of the supervised contrastive loss over shared behaviours, at the beginning."""
    gamma_end: float | None = Field(None, ge=0, le=1)
    """Share at the end, with a straight line between; None: the same."""
    contrastive: Literal["graded", "plain"] = "graded"
    """``plain``: subjects that share any behaviour are positives; ``graded``: as much as their behaviours overlap."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the contrastive loss, at the beginning."""
    temperature_end: float | None = Field(None, gt=0)
    """Temperature at the end; None: the same."""
    projection: int | None = Field(None, ge=1, le=65_536)
    """Numbers of a projection head between the latent and the contrastive loss; None: no head."""
    reconstruction: float = Field(0.05, ge=0)
    """Weight of the error of the weights."""
    reconstruction_form: Literal["normalized", "mse", "mae", "cosine", "combined"] = "normalized"
    """``normalized``: squared error in which each layer counts alike; ``mse``, ``mae`` and ``cosine`` of standardised
    weights, and ``combined``, their sum."""
    behavior: float = Field(1.0, ge=0)
    """Weight of the disagreement of decoded and source networks on fresh sequences."""
    steering: float = Field(3.0, ge=0)
    """Weight of the error of residual edits (source weights plus the change of the decoded ones) on what the edit asks
    for."""
    direct: float = Field(0.75, ge=0)
    """The same for direct edits (the decoded weights themselves)."""
    locality: float = Field(0.8, ge=0, le=1)
    """Share of the two steering terms that asks for the source's own answers where the edit decides nothing."""
    mend: bool = True
    """Whether there, where the source errs, the exact label is asked for instead; else its errors are kept."""
    variance: float = Field(0.0, ge=0)
    """Weight of the guard against collapse: what the latents' standard deviations lack to 1, a mean over them."""

    @model_validator(mode="after")
    def _something(self) -> LossSpec:
        others = (self.reconstruction, self.behavior, self.steering, self.direct, self.variance)
        if not any((self.gamma, *others)):
            raise ValueError("no term has a weight at the first step, so there is nothing to learn; give one a weight")
        return self


class CodecTrainingSpec(OptimizationSpec):
    """How the codec is trained (AdamW, gradients clipped to norm 1)."""

    steps: int = Field(4000, ge=1, le=10_000_000)
    """Most optimiser steps."""
    batch_size: int = Field(256, ge=2, le=65_536, multiple_of=2)
    """Subjects per step, in pairs that share a behaviour."""
    accumulation: int = Field(1, ge=1, le=1024)
    """Parts of a step's batch that go through the model one after the other, with their gradients added."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """After the warm-up: ``cosine`` to a hundredth at the last step; ``plateau``: halved when the validation loss has
    not fallen at ``plateau_patience`` validations in a row."""
    warm_up: int = Field(100, ge=0, le=10_000_000)
    """Steps over which the learning rate rises from 0."""
    plateau_patience: int = Field(4, ge=1, le=10_000)
    """See ``schedule``."""
    patience: int | None = Field(None, ge=1, le=10_000)
    """Early stopping: training ends when the validation loss has not fallen at so many validations in a row, and the
    best model is kept. None: all steps are taken."""
    validate_every: int = Field(250, ge=1, le=10_000_000)
    """Steps between validations."""
    queries: int = Field(128, ge=8, le=65_536)
    """Fresh sequences per step and subject on which decoded networks are run."""
    several: float = Field(0.1, ge=0, le=1)
    """Share of the edits in training that change two behaviours: one is gained and one is lost."""
    weight_decay: float = Field(0.01, ge=0, le=1)
    """Weight decay; the directions have none."""
    ema: float = Field(0.998, ge=0, lt=1)
    """Decay of the running mean of the parameters over the steps, which is the model that is kept; 0: the last step's.
    """
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the codec's matrix products; ``auto``: bfloat16 where the device has units for it."""
    compile: bool = False
    """Whether ``torch.compile`` is used: a minute at the start, faster steps on a GPU."""


class CrossmodalSpec(TrainedSpec):
    """Signature -> latent -> weights, with the latent organised by behaviour."""

    zoo: ArtifactRef
    """The zoo to learn from."""
    codec: CodecSpec = CodecSpec()
    """Architecture."""
    loss: LossSpec = LossSpec()
    """Objective."""
    training: CodecTrainingSpec = CodecTrainingSpec()
    """Optimisation."""
    held_out: float = Field(0.125, gt=0, lt=1)
    """Share of subjects kept for evaluation, never trained on."""
    validation: float = Field(0.05, gt=0, lt=1)
    """Share of subjects kept for the validation loss."""
    hub: HubSpec | None = None
    """Model repository to upload the codec to, its encoder and decoder as files of their own."""
